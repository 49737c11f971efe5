// The Python module _C: how this build was made, and calls.h. It holds no operator and links no torch, so it can be
// read even where the operator library does not load.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "calls.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) { return *text ? py::object(py::str(text)) : py::object(py::none()); }

py::list words(const char* text) { return py::str(text).attr("split")(); }

py::dict build_info() {
  const auto& build = slowfast_fast::kBuildInfo;
  py::dict info;
  info["version"] = build.version;
  info["commit"] = text_or_none(build.commit);
  info["build_type"] = build.build_type;
  info["compiler"] = build.compiler;
  info["torch"] = build.torch;
  info["abi_target"] = "2.10";
  info["cuda"] = text_or_none(build.cuda);
  info["cuda_archs"] = words(build.cuda_archs);
  info["cpu_instruction_sets"] = words(build.cpu_instruction_sets);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How this build of slowfast_fast was made, and what is faster without the interpreter around a call.";
  m.def("build_info", &build_info,
        "version, commit (None outside a git checkout; '-dirty' when files differed from it), build_type, compiler, "
        "torch "
        "(whose headers were used), abi_target (oldest torch served), cuda (None without CUDA kernels), cuda_archs, "
        "cpu_instruction_sets.");
  slowfast_fast::define_calls(m);
}
