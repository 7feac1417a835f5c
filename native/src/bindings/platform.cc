// The machine and the knobs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "control/knobs.h"
#include "kernels/kernels.h"
#include "platform/cgroup.h"
#include "platform/cpu.h"
#include "platform/memory.h"

namespace py = pybind11;

namespace edgert {
namespace {

py::dict describe(const Knob& knob) {
  py::dict row;
  row["name"] = knob.name;
  row["kind"] = name(knob.kind);
  row["default"] = std::visit([](auto value) -> py::object { return py::cast(value); }, knob.default_value);
  row["minimum"] = knob.minimum;
  row["maximum"] = knob.maximum;
  row["choices"] = py::cast(std::vector(knob.choices.begin(), knob.choices.end()));
  row["unit"] = knob.unit;
  row["live"] = knob.live;
  row["lossy"] = knob.lossy;
  row["help"] = knob.help;
  return row;
}

}  // namespace

void bind_platform(py::module_& module) {
  module.def(
      "available_memory_bytes", [](const std::string& root) { return available_memory_bytes(root); },
      py::arg("root") = "/");
  module.def(
      "cgroup_directories",
      [](const std::string& controller, const std::string& root) {
        std::vector<std::pair<int, std::string>> rows;
        for (const auto& [version, path] : cgroup_directories(controller, root))
          rows.emplace_back(version, path.string());
        return rows;
      },
      py::arg("controller"), py::arg("root") = "/");
  module.def("anonymous_resident_bytes", &anonymous_resident_bytes);
  module.def(
      "usable_cores", [](const std::string& root) { return usable_cores(root); }, py::arg("root") = "/");
  module.def("cpu_name", &cpu_name);
  module.def("cpu_features", [] {
    const CpuFeatures& features = cpu_features();
    py::dict flags;
    flags["avx2"] = features.avx2;
    flags["avx_vnni"] = features.avx_vnni;
    flags["avx512_vnni"] = features.avx512_vnni;
    flags["neon_dot"] = features.neon_dot;
    flags["neon_i8mm"] = features.neon_i8mm;
    return flags;
  });
  module.def("runnable_isas", [] {
    const auto names = runnable_kernels();
    return std::vector(names.begin(), names.end());
  });
  module.def("page_size", &page_size);
  module.def("knobs", [] {
    py::list rows;
    for (const Knob& row : knobs()) rows.append(describe(row));
    return rows;
  });
}

}  // namespace edgert
