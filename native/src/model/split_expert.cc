#include "model/split_expert.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "quant/split.h"

namespace edgert {
namespace {

struct Piece {  // one matrix
  FormatId format;
  std::size_t rows, cols;
  std::size_t whole, base, refinement;  // offsets, the last from where refinements begin
};

std::array<Piece, 3> pieces(const SplitLayout& layout, std::size_t hidden, const FfnRecipe& ffn) {
  const auto width = static_cast<std::size_t>(ffn.intermediate_size);
  const ExpertFormats& formats = layout.whole.formats;
  std::array<Piece, 3> all{
      Piece{formats.gate, width, hidden, 0, 0, 0},
      Piece{formats.up, width, hidden, layout.whole.up_offset, layout.base.up_offset, 0},
      Piece{formats.down, hidden, width, layout.whole.down_offset, layout.base.down_offset, 0},
  };
  for (std::size_t i = 1; i < all.size(); ++i) {
    const Piece& before = all[i - 1];
    all[i].refinement = before.refinement + refinement_bytes(format(before.format), before.rows, before.cols);
  }
  return all;
}

template <typename Byte>
std::span<Byte> matrix(std::span<Byte> of, std::size_t offset, FormatId id, const Piece& piece) {
  return of.subspan(offset, packed_bytes(format(id), piece.rows, piece.cols));
}

template <typename Byte>
std::span<Byte> refinement_of(std::span<Byte> of, const Piece& piece) {
  return of.subspan(piece.refinement, refinement_bytes(format(piece.format), piece.rows, piece.cols));
}

}  // namespace

std::optional<ExpertFormats> base_formats(const ExpertFormats& formats) noexcept {
  const auto gate = base_format(formats.gate), up = base_format(formats.up), down = base_format(formats.down);
  if (!gate || !up || !down) return std::nullopt;
  return ExpertFormats{*gate, *up, *down};
}

SplitLayout split_layout(const ExpertFormats& formats, std::size_t hidden_size, const FfnRecipe& ffn) {
  SplitLayout layout;
  layout.whole = expert_layout(formats, hidden_size, ffn);
  layout.base = expert_layout(*base_formats(formats), hidden_size, ffn);
  layout.refinement_offset = ExpertEntry::refinement_offset(layout.base.bytes);
  const Piece last = pieces(layout, hidden_size, ffn).back();
  layout.bytes = layout.refinement_offset + last.refinement +
                 refinement_bytes(format(last.format), last.rows, last.cols);
  return layout;
}

bool split_expert(const SplitLayout& layout, std::size_t hidden_size, const FfnRecipe& ffn,
                  std::span<const std::byte> whole, std::span<std::byte> parts) {
  const std::span<std::byte> base = parts.first(layout.base.bytes);
  const std::span<std::byte> refinement = parts.subspan(layout.refinement_offset);
  std::fill(parts.begin(), parts.end(), std::byte{0});
  bool same = true;
  for (const Piece& piece : pieces(layout, hidden_size, ffn)) {
    same =
        split(format(piece.format), piece.rows, piece.cols, matrix(whole, piece.whole, piece.format, piece),
              matrix(base, piece.base, *base_format(piece.format), piece),
              refinement_of(refinement, piece)) &&
        same;
  }
  const auto biases = whole.subspan(layout.whole.bias_offset);
  std::copy(biases.begin(), biases.end(), base.subspan(layout.base.bias_offset).begin());
  return same;
}

void join_expert(const SplitLayout& layout, std::size_t hidden_size, const FfnRecipe& ffn,
                 std::span<const std::byte> base, std::span<const std::byte> refinement,
                 std::span<std::byte> whole) {
  for (const Piece& piece : pieces(layout, hidden_size, ffn)) {
    join(format(piece.format), piece.rows, piece.cols,
         matrix(base, piece.base, *base_format(piece.format), piece), refinement_of(refinement, piece),
         matrix(whole, piece.whole, piece.format, piece));
  }
  const auto biases = base.subspan(layout.base.bias_offset);
  std::copy(biases.begin(), biases.end(), whole.subspan(layout.whole.bias_offset).begin());
}

}  // namespace edgert
