// Adapters: arrays from Python, which the native side copies.
#include "adapters/adapter.h"

#include <pybind11/stl.h>

#include <deque>
#include <memory>
#include <optional>

#include "adapters/matrix_patch.h"
#include "adapters/stored_patches.h"
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
  source.remainders = numbers("remainders", std::int8_t{});
  source.gain = numbers("gain", float{});
  source.shift = numbers("shift", float{});
  source.weights = bytes("weights");
  source.weight_rows = numbers("weight_rows", std::int32_t{});
  source.gate = numbers("gate", float{});
  if (part.contains("scale")) source.factor_scale = part["scale"].cast<float>();
  if (part.contains("gain_spares_bias")) source.gain_spares_bias = part["gain_spares_bias"].cast<bool>();
  return source;
}

py::dict describe(const PatchCounts& counts) {
  py::dict out;
  out["values"] = counts.values;
  out["unchanged"] = counts.unchanged;
  out["clamped"] = counts.clamped;
  out["intended"] = counts.intended;
  out["error"] = counts.error;
  out["apart"] = counts.apart;
  out["beside"] = counts.beside;
  out["fidelity"] = counts.fidelity();
  out["loss"] = counts.loss();
  return out;
}

// What Python lends of a delta of one packed matrix.
struct LentDelta {
  LentDelta(const py::object& packed_, const py::object& rows_, const py::object& cols_,
            const py::object& values_, const py::object& remainders_)
      : packed(packed_, "packed"), rows(rows_, "rows"), cols(cols_, "cols"), values(values_, "values") {
    if (!remainders_.is_none()) remainders.emplace(remainders_, "remainders");
  }
  MatrixDelta delta() const {
    MatrixDelta out{rows.as<const std::int32_t>(), cols.as<const std::int32_t>(), values.as<const float>()};
    if (remainders) out.remainders = remainders->as<const std::int8_t>();
    return out;
  }
  BorrowedBuffer packed, rows, cols, values;
  std::optional<BorrowedBuffer> remainders;
};

py::bytes as_bytes(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

py::tuple patch(const std::string& name, const py::object& packed, std::pair<std::size_t, std::size_t> shape,
                const py::object& rows, const py::object& cols, const py::object& values,
                const py::object& remainders) {
  const LentDelta lent(packed, rows, cols, values, remainders);
  PatchCounts counts;
  const auto made = [&] {
    const py::gil_scoped_release released;
    return matrix_patch(format(name), lent.packed.bytes(), shape.first, shape.second, lent.delta(), counts);
  }();
  return py::make_tuple(as_bytes(made), describe(counts));
}

py::bytes remainders(const std::string& name, const py::object& packed,
                     std::pair<std::size_t, std::size_t> shape, const py::object& rows,
                     const py::object& cols, const py::object& floats) {
  const LentDelta lent(packed, rows, cols, floats, py::none());
  const auto found = [&] {
    const py::gil_scoped_release released;
    return matrix_remainders(format(name), lent.packed.bytes(), shape.first, shape.second, lent.delta());
  };
  const auto steps = found();
  return as_bytes(std::as_bytes(std::span(steps)));
}

}  // namespace

std::shared_ptr<PatchSet> stored_patches(Model& model, const std::shared_ptr<Adapter>& adapter,
                                         const std::string& path, const std::vector<StoredPlace>& places,
                                         const py::dict& counts, bool keep) {
  if (!adapter) throw Error(ErrorKind::invalid_argument, "adapter: found None");
  PatchFile file;
  const auto whole = [&](const char* key) { return counts[key].cast<std::uint64_t>(); };
  const auto sum = [&](const char* key) { return counts[key].cast<double>(); };
  file.counts = {whole("values"), whole("unchanged"), whole("clamped"), sum("intended"),
                 sum("error"),    sum("apart"),       sum("beside")};
  const py::gil_scoped_release released;
  file.file = File::open(path, DirectIo::off);
  for (const auto& [target, offset, bytes] : places) file.places.push_back({target, offset, bytes});
  return model.patches(adapter, std::move(file), keep);
}

std::uint64_t adapter_fingerprint(const std::vector<py::dict>& parts) {
  std::deque<BorrowedBuffer> lent;
  std::vector<AdapterSource> sources;
  for (const py::dict& part : parts) sources.push_back(source_of(part, lent));
  return Adapter::fingerprint_of(sources);
}

std::shared_ptr<Adapter> make_adapter(const Model& model, const std::string& name,
                                      const std::vector<py::dict>& parts, std::uint64_t order,
                                      std::size_t added_tokens) {
  std::deque<BorrowedBuffer> lent;
  std::vector<AdapterSource> sources;
  for (const py::dict& part : parts) sources.push_back(source_of(part, lent));
  const py::gil_scoped_release released;
  return std::const_pointer_cast<Adapter>(model.adapter(name, sources, order, added_tokens));
}

AdapterMix mix_of(const Mix& adapters, std::shared_ptr<PatchSet> patches, std::size_t top_k) {
  AdapterMix mix;
  mix.patch = std::move(patches);
  mix.top_k = top_k;
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
      .def_property_readonly("added_tokens", &Adapter::added_tokens)
      .def_property_readonly("in_use", &Adapter::in_use)
      .def_property_readonly("ungated", &Adapter::ungated)
      .def_property_readonly("bytes", &Adapter::bytes);
  py::class_<PatchSet, std::shared_ptr<PatchSet>>(module, "Patches")
      .def_property_readonly("bytes", &PatchSet::bytes)
      .def_property_readonly("covered", &PatchSet::covered)
      .def_property_readonly("left", &PatchSet::left)
      .def("counts", [](const PatchSet& set) { return describe(set.counts()); });
  module.def("matrix_patch", &patch, py::arg("format"), py::arg("packed"), py::arg("shape"), py::arg("rows"),
             py::arg("cols"), py::arg("values"), py::arg("remainders"));
  module.def("remainders", &remainders, py::arg("format"), py::arg("packed"), py::arg("shape"),
             py::arg("rows"), py::arg("cols"), py::arg("floats"));
  module.def("adapter_fingerprint", &adapter_fingerprint, py::arg("parts"));
}

}  // namespace edgert
