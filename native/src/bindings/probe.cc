// What measures the machine.
#include "engine/probe.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace edgert {

void bind_probe(py::module_& module) {
  module.def("memory_probe_bytes", &memory_probe_bytes);
  module.def(
      "measure_memory",
      [](int threads, std::size_t bytes) {
        const py::gil_scoped_release released;
        ThreadPool pool(threads);
        return measure_memory(pool, bytes);
      },
      py::arg("threads"), py::arg("bytes"));
  module.def(
      "measure_arithmetic",
      [](int threads, const std::string& isa) {
        const py::gil_scoped_release released;
        ThreadPool pool(threads);
        return measure_arithmetic(pool, isa.empty() ? kernels() : kernels(isa));
      },
      py::arg("threads"), py::arg("isa") = "");
  module.def("usable_io_backends", [] {
    std::vector<std::string> usable = {"pread"};
    if (io_uring_works()) usable.push_back("io_uring");
    return usable;
  });
  py::class_<ReadProbe>(module, "ReadProbe")
      .def(py::init([](const std::string& path) {
             const py::gil_scoped_release released;
             return std::make_unique<ReadProbe>(path);
           }),
           py::arg("path"))
      .def_property_readonly("takes_direct", &ReadProbe::takes_direct)
      .def(
          "measure",
          [](ReadProbe& self, std::uint64_t span_bytes, std::size_t block_bytes, int depth, bool random,
             bool direct, const std::string& backend, double seconds) {
            const py::gil_scoped_release released;
            return self.measure(
                {span_bytes, block_bytes, depth, random, direct, io_backend(backend), seconds});
          },
          py::kw_only(), py::arg("span_bytes"), py::arg("block_bytes"), py::arg("depth"), py::arg("random"),
          py::arg("direct"), py::arg("io_backend"), py::arg("seconds"));
}

}  // namespace edgert
