// Experts split into base and refinement, for the converter.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "bindings/bindings.h"
#include "bindings/buffer.h"
#include "bundle/xxhash.h"
#include "model/split_expert.h"
#include "platform/error.h"

namespace py = pybind11;
using namespace py::literals;

namespace edgert {
namespace {

using Names = std::vector<std::string>;

struct Shape {
  std::size_t hidden;
  FfnRecipe ffn;
  SplitLayout layout;
};

// nullopt where one of the formats does not split.
std::optional<Shape> shape_of(const Names& formats, int hidden, int width, bool biased) {
  if (formats.size() != 3 || hidden < 1 || width < 1)
    throw Error(ErrorKind::invalid_argument, "a split expert has three formats and two positive sizes");
  const ExpertFormats whole{format(formats[0]).id, format(formats[1]).id, format(formats[2]).id};
  if (!base_formats(whole)) return std::nullopt;
  Shape shape{static_cast<std::size_t>(hidden), {}, {}};
  shape.ffn.intermediate_size = width;
  shape.ffn.expert_bias = biased;
  shape.layout = split_layout(whole, shape.hidden, shape.ffn);
  return shape;
}

std::optional<std::tuple<std::size_t, std::size_t>> sizes(const Names& formats, int hidden, int width,
                                                          bool biased) {
  const auto shape = shape_of(formats, hidden, width, biased);
  if (!shape) return std::nullopt;
  return std::tuple(shape->layout.base.bytes, shape->layout.bytes);
}

std::tuple<std::string, std::string, std::string> split(const Names& formats, int hidden, int width,
                                                        bool biased, const py::object& packed,
                                                        const py::object& destination) {
  const auto shape = shape_of(formats, hidden, width, biased);
  if (!shape) throw Error(ErrorKind::unsupported, "formats whose precision cannot be split");
  const BorrowedBuffer from(packed, "packed"), to(destination, "destination", BorrowedBuffer::Access::write);
  const std::span<const std::byte> whole = from.bytes();
  const std::span<std::byte> parts = to.as<std::byte>();
  const SplitLayout& layout = shape->layout;
  if (whole.size() != layout.whole.bytes || parts.size() != layout.bytes) {
    throw Error(ErrorKind::invalid_argument, "packed and destination: found " + std::to_string(whole.size()) +
                                                 " and " + std::to_string(parts.size()) +
                                                 " bytes, allowed are " + std::to_string(layout.whole.bytes) +
                                                 " and " + std::to_string(layout.bytes));
  }
  const py::gil_scoped_release release;
  if (!split_expert(layout, shape->hidden, shape->ffn, whole, parts))
    throw Error(ErrorKind::unsupported, "scales or zeros whose precision cannot be split");
  return {digest_text(xxh64(parts)), digest_text(xxh64(parts.first(layout.base.bytes))),
          digest_text(xxh64(parts.subspan(layout.refinement_offset)))};
}

}  // namespace

void bind_split(py::module_& module) {
  module.def("split_sizes", &sizes, "formats"_a, "hidden_size"_a, "intermediate_size"_a, "biased"_a);
  module.def("split_expert", &split, "formats"_a, "hidden_size"_a, "intermediate_size"_a, "biased"_a,
             py::kw_only(), "packed"_a, "destination"_a);
}

}  // namespace edgert
