// Adapters: arrays from Python, which the native side copies.
#include "adapters/adapter.h"

#include <pybind11/stl.h>

#include <deque>
#include <memory>

#include "bindings/bindings.h"
#include "bindings/buffer.h"
#include "engine/model.h"
#include "platform/error.h"

namespace py = pybind11;

namespace edgert {
namespace {

// One part as AdapterSource has it; absent keys mean that there is none.
AdapterSource source_of(const py::dict& part, std::deque<BorrowedBuffer>& lent) {
  const auto bytes = [&](const char* key) -> std::span<const std::byte> {
    if (!part.contains(key)) return {};
    return lent.emplace_back(part[key], key).bytes();
  };
  const auto numbers = [&]<typename T>(const char* key, T) -> std::span<const T> {
    const auto raw = bytes(key);
    return {reinterpret_cast<const T*>(raw.data()), raw.size() / sizeof(T)};
  };
  AdapterSource source;
  source.target = part["target"].cast<std::string>();
  if (part.contains("dtype")) source.type = source_type(part["dtype"].cast<std::string>());
  if (part.contains("rank")) source.rank = part["rank"].cast<std::size_t>();
  source.a = bytes("a");
  source.b = bytes("b");
  source.rows = numbers("rows", std::int32_t{});
  source.cols = numbers("cols", std::int32_t{});
  source.values = numbers("values", float{});
  source.gain = numbers("gain", float{});
  source.shift = numbers("shift", float{});
  source.weights = bytes("weights");
  source.weight_rows = numbers("weight_rows", std::int32_t{});
  if (part.contains("scale")) source.factor_scale = part["scale"].cast<float>();
  if (part.contains("gain_spares_bias")) source.gain_spares_bias = part["gain_spares_bias"].cast<bool>();
  return source;
}

}  // namespace

std::shared_ptr<Adapter> make_adapter(const Model& model, const std::string& name,
                                      const std::vector<py::dict>& parts, std::uint64_t order) {
  std::deque<BorrowedBuffer> lent;
  std::vector<AdapterSource> sources;
  for (const py::dict& part : parts) sources.push_back(source_of(part, lent));
  const py::gil_scoped_release released;
  return std::const_pointer_cast<Adapter>(model.adapter(name, sources, order));
}

AdapterMix mix_of(const Mix& adapters) {
  AdapterMix mix;
  for (const auto& [adapter, scale] : adapters) {
    if (!adapter) throw Error(ErrorKind::invalid_argument, "adapters: found None");
    mix.entries.push_back({adapter, scale});
  }
  return mix;
}

void bind_adapter(py::module_& module) {
  py::class_<Adapter, std::shared_ptr<Adapter>>(module, "Adapter")
      .def_property_readonly("name", &Adapter::name)
      .def_property_readonly("fingerprint", &Adapter::fingerprint)
      .def_property_readonly("in_use", &Adapter::in_use)
      .def_property_readonly("bytes", &Adapter::bytes);
}

}  // namespace edgert
