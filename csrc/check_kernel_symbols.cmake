# Fails when an object compiled for one instruction set defines a symbol that another object may define too (a weak one:
# inline functions, templates) outside its own namespace. The linker keeps any one of them, for every caller: it could hand
# AVX-512 code to a machine without it. Arguments: NM, ISA, OBJECTS (separated by |).
string(REPLACE "|" ";" objects "${OBJECTS}")
execute_process(COMMAND "${NM}" --demangle --defined-only ${objects} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE "[][;]" "?" symbols "${symbols}")  # these would join or split the entries of a CMake list
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" shared "${symbols}")
list(FILTER shared EXCLUDE REGEX "slowfast_fast::([a-z_]+::)*${ISA}::")
if(shared)
  string(REPLACE ";" "\n  " shared "${shared}")
  message(FATAL_ERROR "kernels compiled for ${ISA} define symbols that other code shares:\n  ${shared}\n"
                      "Keep everything in a namespace named SFF_ISA and use no library function that is not inlined.")
endif()
