#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/bindings.h"
#include "bindings/buffer.h"
#include "bundle/xxhash.h"
#include "quant/format.h"
#include "quant/ggml.h"
#include "quant/pack.h"
#include "quant/random.h"
#include "quant/repack.h"

namespace py = pybind11;
using namespace py::literals;

namespace edgert {

namespace {

using Access = BorrowedBuffer::Access;

std::string_view name_of(ScaleType type) {
  constexpr std::string_view kNames[] = {"none", "f16", "e8m0", "i8", "u4", "u4x2"};
  return kNames[static_cast<std::size_t>(type)];
}

std::string_view name_of(ZeroType type) {
  constexpr std::string_view kNames[] = {"none", "u8", "min_f16", "min_u8", "min_u4"};
  return kNames[static_cast<std::size_t>(type)];
}

std::string_view name_of(Codebook codebook) {
  constexpr std::string_view kNames[] = {"none", "iq4_nl", "e2m1", "nl2", "nl3", "nl4"};
  return kNames[static_cast<std::size_t>(codebook)];
}

py::list format_table() {
  py::list table;
  for (const Format& row : formats()) {
    table.append(py::dict("name"_a = row.name, "bits"_a = row.bits, "group"_a = row.group,
                          "block"_a = row.block, "scale"_a = name_of(row.scale), "zero"_a = name_of(row.zero),
                          "codebook"_a = name_of(row.codebook), "packs_floats"_a = packs_floats(row),
                          "bits_per_weight"_a = bits_per_weight(row)));
  }
  return table;
}

py::list block_table() {
  py::list table;
  for (const BlockType& row : block_types()) {
    table.append(py::dict("name"_a = row.name, "elements"_a = row.elements(), "bytes"_a = row.bytes,
                          "format"_a = format(row.format).name));
  }
  return table;
}

std::shared_ptr<Moments> make_moments(const py::object& values, std::size_t cols) {
  const BorrowedBuffer from(values, "moments");
  const py::gil_scoped_release release;
  return std::make_shared<Moments>(from.as<const float>(), cols);
}

py::tuple pack(const std::string& name, const py::object& source, const std::string& dtype, std::size_t rows,
               std::size_t cols, const py::object& destination, const std::optional<py::object>& remainder,
               const py::object& moments, int threads) {
  const BorrowedBuffer from(source, "source");
  const BorrowedBuffer to(destination, "destination", Access::write);
  std::optional<BorrowedBuffer> rest;
  if (remainder) rest.emplace(*remainder, "remainder", Access::write);
  std::shared_ptr<Moments> weights;
  if (py::isinstance<Moments>(moments)) {
    weights = moments.cast<std::shared_ptr<Moments>>();
  } else if (!moments.is_none()) {
    weights = make_moments(moments, cols);
  }
  PackReport report;
  {
    const py::gil_scoped_release release;
    report = pack_matrix(format(name), source_type(dtype), from.bytes(), rows, cols, to.as<std::byte>(),
                         rest ? rest->as<std::int8_t>() : std::span<std::int8_t>(), threads, weights.get());
  }
  if (!weights) return py::make_tuple(report.squared_error, report.squared_weight, report.max_error);
  return py::make_tuple(report.squared_error, report.squared_weight, report.max_error, report.weighted_error);
}

py::bytes unpack(const std::string& name, const py::object& packed, std::size_t rows, std::size_t cols) {
  const BorrowedBuffer from(packed, "packed");
  const Format& form = format(name);
  if (from.bytes().size() != packed_bytes(form, rows, cols)) {
    throw Error(ErrorKind::invalid_argument, "packed has " + std::to_string(from.bytes().size()) +
                                                 " bytes; needed are " +
                                                 std::to_string(packed_bytes(form, rows, cols)));
  }
  py::bytes result(nullptr, rows * cols * sizeof(float));
  float* const out = reinterpret_cast<float*>(PyBytes_AS_STRING(result.ptr()));
  const py::gil_scoped_release release;
  for (std::size_t row = 0; row < rows; ++row)
    unpack_row(form, from.bytes(), rows, cols, row, {out + row * cols, cols});
  return result;
}

void repack_blocks(const std::string& name, const py::object& source, std::size_t rows, std::size_t cols,
                   const py::object& destination, int threads) {
  const BorrowedBuffer from(source, "source");
  const BorrowedBuffer to(destination, "destination", Access::write);
  const py::gil_scoped_release release;
  repack(block_type(name), from.bytes(), rows, cols, to.as<std::byte>(), threads);
}

py::bytes dequantize_blocks(const std::string& name, const py::object& source, std::size_t rows,
                            std::size_t cols) {
  const BorrowedBuffer from(source, "source");
  const BlockType& type = block_type(name);
  packed_bytes(format(type.format), rows, cols);  // an error where rows * cols is out of range
  py::bytes result(nullptr, rows * cols * sizeof(float));
  float* const out = reinterpret_cast<float*>(PyBytes_AS_STRING(result.ptr()));
  const py::gil_scoped_release release;
  dequantize(type, from.bytes(), rows, cols, {out, rows * cols});
  return result;
}

void pack_coded(const std::string& name, const py::object& codes, const py::object& scales,
                const std::optional<py::object>& zeros, std::size_t rows, std::size_t cols,
                const py::object& destination, int threads) {
  const Format& form = format(name);
  const BorrowedBuffer from(codes, "codes"), steps(scales, "scales");
  const BorrowedBuffer to(destination, "destination", Access::write);
  std::optional<BorrowedBuffer> centres;
  if (zeros) centres.emplace(*zeros, "zeros");
  CodedMatrix source;
  source.codes = from.as<const std::uint8_t>();
  if (form.scale == ScaleType::e8m0) {
    source.exponents = steps.as<const std::uint8_t>();
  } else {
    source.scales = steps.as<const float>();
  }
  if (centres && form.has_minima()) {
    source.minima = centres->as<const float>();
  } else if (centres) {
    source.zeros = centres->as<const std::uint8_t>();
  }
  const py::gil_scoped_release release;
  pack_codes(form, source, rows, cols, to.as<std::byte>(), threads);
}

void fill(const std::string& name, std::size_t rows, std::size_t cols, float deviation, std::uint64_t seed,
          const py::object& destination) {
  const BorrowedBuffer to(destination, "destination", Access::write);
  const py::gil_scoped_release release;
  fill_random(format(name), rows, cols, deviation, seed, to.as<std::byte>());
}

std::string hash(const py::object& data) {
  const BorrowedBuffer buffer(data, "data");
  const py::gil_scoped_release release;
  return digest_text(xxh64(buffer.bytes()));
}

void update(Xxh64& hash, const py::object& data) {
  const BorrowedBuffer buffer(data, "data");
  const py::gil_scoped_release release;
  hash.update(buffer.bytes());
}

}  // namespace

void bind_quant(py::module_& module) {
  module.def("formats", &format_table);
  module.def(
      "packed_bytes",
      [](const std::string& name, std::size_t rows, std::size_t cols) {
        return packed_bytes(format(name), rows, cols);
      },
      "format"_a, "rows"_a, "cols"_a);
  module.def("pack", &pack, "format"_a, "source"_a, "dtype"_a, "rows"_a, "cols"_a, py::kw_only(),
             "destination"_a, "remainder"_a = py::none(), "moments"_a = py::none(), "threads"_a = 0);
  py::class_<Moments, std::shared_ptr<Moments>>(module, "Moments")
      .def(py::init(&make_moments), "values"_a, "cols"_a)
      .def_property_readonly("cols", &Moments::cols)
      .def_property_readonly("is_full", &Moments::is_full);
  module.def("block_types", &block_table);
  module.def("repack", &repack_blocks, "type"_a, "source"_a, "rows"_a, "cols"_a, py::kw_only(),
             "destination"_a, "threads"_a = 0);
  module.def("dequantize", &dequantize_blocks, "type"_a, "source"_a, "rows"_a, "cols"_a);
  module.def("pack_codes", &pack_coded, "format"_a, "codes"_a, "scales"_a, "zeros"_a, "rows"_a, "cols"_a,
             py::kw_only(), "destination"_a, "threads"_a = 0);
  module.def("unpack", &unpack, "format"_a, "packed"_a, "rows"_a, "cols"_a);
  module.def("fill_random", &fill, "format"_a, "rows"_a, "cols"_a, py::kw_only(), "deviation"_a, "seed"_a,
             "destination"_a);
  module.def("xxh64", &hash, "data"_a);
  py::class_<Xxh64>(module, "Xxh64")
      .def(py::init<>())
      .def("update", &update, "data"_a)
      .def("hexdigest", [](const Xxh64& self) { return digest_text(self.digest()); });
}

}  // namespace edgert
