// What happens in Python around the kernel of every call, without the interpreter: functions of the module _C, which
// slowfast_fast/_C.pyi documents.
#pragma once
#include <pybind11/pybind11.h>

namespace slowfast_fast {

void define_calls(pybind11::module_& module);

}  // namespace slowfast_fast
