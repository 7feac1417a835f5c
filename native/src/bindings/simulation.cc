// StoreSimulation.
#include "experts/simulation.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace edgert {

void bind_simulation(py::module_& module) {
  using Sizes = std::vector<std::vector<std::uint64_t>>;
  py::class_<StoreSimulation>(module, "StoreSimulation")
      .def(py::init([](const Sizes& sizes, std::uint64_t capacity_bytes, const std::string& word,
                       const std::optional<std::vector<RoutedStep>>& future) {
             return future ? StoreSimulation(sizes, capacity_bytes, *future)
                           : StoreSimulation(sizes, capacity_bytes, eviction(word));
           }),
           py::arg("sizes"), py::arg("capacity_bytes"), py::arg("eviction") = std::string(kEvictions[0]),
           py::kw_only(), py::arg("future") = py::none())
      .def(
          "run",
          [](StoreSimulation& simulation, const std::vector<RoutedStep>& steps) {
            const StoreSimulation::Counts counts = simulation.run(steps);
            py::dict out;
            out["hits"] = counts.hits;
            out["misses"] = counts.misses;
            out["evictions"] = counts.evictions;
            out["bytes"] = counts.bytes;
            return out;
          },
          py::arg("steps"));
}

}  // namespace edgert
