// sensilora._C: importing it loads the shared library, which registers the ops; it also tells how it was built.
// The pybind11 that older torch ships refuses to be used beside the stable ABI; this file uses nothing of torch's.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cpu.h"

#ifndef SENSILORA_WITH_CUDA
#define SENSILORA_WITH_CUDA 0
#endif
#ifndef SENSILORA_CUDA_ARCHITECTURES
#define SENSILORA_CUDA_ARCHITECTURES
#endif
#define SENSILORA_AS_TEXT(words) #words
#define SENSILORA_TEXT_OF(words) SENSILORA_AS_TEXT(words)

PYBIND11_MODULE(_C, m) {
  m.attr("compiler") = "C++ " __VERSION__;
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda") = static_cast<bool>(SENSILORA_WITH_CUDA);
  m.attr("cuda_architectures") = SENSILORA_TEXT_OF(SENSILORA_CUDA_ARCHITECTURES);
  m.def("cpu_level", &sensilora::cpu_level_name, "The vector instructions the CPU ops use on this machine.");
}
