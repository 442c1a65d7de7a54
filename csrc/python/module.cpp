// fastops._C: the control plane (instruction sets, versions), and the direct calls of small operators (direct.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "fastops/fastops.h"
#include "python/direct.h"
#include "torch/libraries.h"
#include "torch/memory.h"

extern "C" const char* fastops_torch_last_variant(void);

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Control plane of the fastops core library.";
  m.def("version", &fastops_version);
  m.def(
      "isa_names",
      [] {
        std::vector<std::string> names;
        for (const char* const* n = fastops_isa_names(); *n; ++n) names.emplace_back(*n);
        return names;
      },
      "Names of the instruction-set variants, best first.");
  m.def("isa_compiled", [](const std::string& n) { return fastops_isa_compiled(n.c_str()) != 0; });
  m.def("isa_supported", [](const std::string& n) { return fastops_isa_supported(n.c_str()) != 0; });
  m.def("isa_active", &fastops_isa_active);
  m.def("isa_refusal", &fastops_isa_refusal, "Why FASTOPS_ISA cannot be had, or None.");
  m.def(
      "isa_set",
      [](const std::string& name) {
        char message[FASTOPS_MESSAGE_SIZE] = "";
        const fastops_status status = fastops_isa_set(name.c_str(), message);
        if (status == FASTOPS_ERR_VALUE) throw py::value_error(message);
        if (status != FASTOPS_OK) {
          PyErr_SetString(PyExc_NotImplementedError, message);
          throw py::error_already_set();
        }
      },
      py::arg("name"), "Forces a variant for the process; 'auto' lifts that.");
  m.def("cores", &fastops_cores, "The cores that plans are made for.");
  m.def("cores_refusal", &fastops_cores_refusal, "Why FASTOPS_CORES cannot be had, or None.");
  m.def(
      "cores_set",
      [](int32_t n) {
        char message[FASTOPS_MESSAGE_SIZE] = "";
        if (fastops_cores_set(n, message) != FASTOPS_OK) throw py::value_error(message);
      },
      py::arg("n"), "Plans for so many cores; 0 lifts that.");
  m.def("last_variant", &fastops_torch_last_variant, "The variant the last operator call on this thread ran.");
  m.def(
      "load_cuda",
      [](const std::string& path, bool for_gpus, std::uintptr_t start, std::uintptr_t facts) {
        const char* problem = fastops_torch_load(path.c_str(), for_gpus, reinterpret_cast<void*>(start),
                                                 reinterpret_cast<fastops_torch_facts>(facts));
        return problem == nullptr ? std::optional<std::string>() : std::optional<std::string>(problem);
      },
      py::arg("path"), py::arg("for_gpus"), py::arg("start") = 0, py::arg("facts") = 0,
      "Takes a library of CUDA kernels into use: for GPUs, or the emulator. What is wrong with it, or None.");
  m.def("cuda_archs", &fastops_torch_archs, py::arg("for_gpus"), "Architectures of the loaded library.");
  m.def("set_mode", &fastops_torch_set_mode, py::arg("mode"), "How this thread's calls are taken; the mode before.");
  m.attr("EMULATE") = static_cast<int>(fastops::binding::kEmulate);
  m.attr("OR_REFUSE") = static_cast<int>(fastops::binding::kOrRefuse);
  m.def("last_refusal", &fastops_torch_last_refusal, "Why the kernels did not take this thread's last refused call.");
  m.def(
      "prefer_large_pages",
      [](std::uintptr_t data, std::size_t bytes) {
        fastops::binding::prefer_large_pages(reinterpret_cast<void*>(data), bytes);
      },
      py::arg("data"), py::arg("bytes"), "For memory that lasts, before it is written first.");
  if (PyModule_AddFunctions(m.ptr(), fastops::direct::methods()) != 0) throw py::error_already_set();
  m.def("build_info", [] {
    py::dict d;
    d["compiler"] = FASTOPS_COMPILER;
    d["flags"] = FASTOPS_FLAGS;
    d["torch_abi"] = FASTOPS_TORCH_ABI;
    return d;
  });
}
