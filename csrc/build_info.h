// What CMake knows of this build, as text; an empty string stands for "none". The values are in a source of their own,
// which CMake writes, so that a new commit recompiles these few lines and not the Python module.
#pragma once

namespace slowfast_fast {

struct BuildInfo {
  const char* version;
  const char* commit;
  const char* build_type;
  const char* compiler;
  const char* torch;
  const char* cuda;
  const char* cuda_archs;            // separated by spaces
  const char* cpu_instruction_sets;  // separated by spaces
};

extern const BuildInfo kBuildInfo;

}  // namespace slowfast_fast
