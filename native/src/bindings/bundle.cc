// Bundles: opening, checking, verifying.
#include "bundle/bundle.h"

#include "bindings/bindings.h"
#include "model/recipe.h"
#include "model/weights.h"

namespace py = pybind11;

namespace edgert {
namespace {

py::dict open_bundle(const std::string& path) {
  std::uint64_t experts = 0, dense = 0;
  std::size_t count = 0;
  std::string manifest;
  {
    const py::gil_scoped_release released;
    const Bundle bundle = Bundle::open(path, DirectIo::off);
    dense = Weights::resident_bytes(bundle, recipe_of(bundle));
    for (const auto& layer : bundle.manifest().experts) {
      for (const ExpertEntry& expert : layer.experts) experts += expert.extent.bytes;
    }
    count = bundle.manifest().num_experts();
    manifest = read_manifest(path);
  }
  py::dict out;
  out["manifest"] = manifest;
  out["dense_bytes"] = dense;
  out["expert_bytes"] = experts;
  out["num_experts"] = count;
  return out;
}

std::uint64_t verify_bundle(const std::string& path, const py::object& progress) {
  const py::gil_scoped_release released;
  const Bundle bundle = Bundle::open(path, DirectIo::off);
  Weights::resident_bytes(bundle, recipe_of(bundle));
  return bundle.verify([&](std::uint64_t done, std::uint64_t total) {
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, total);
  });
}

}  // namespace

void bind_bundle(py::module_& module) {
  module.def(
      "check_recipe", [](const std::string& json) { parse_recipe(Json::parse(json, "recipe"), "recipe"); },
      py::arg("recipe_json"));
  module.def("open_bundle", &open_bundle, py::arg("path"));
  module.def("verify_bundle", &verify_bundle, py::arg("path"), py::arg("progress") = py::none());
}

}  // namespace edgert
