// What adapters can change of a model, each by a number of its own: matrices, norms and the embedding.
//
// Threads: immutable once a model is loaded.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace edgert {

enum class ExpertPart : int { gate, up, down };

class Targets {
 public:
  enum class Kind : int { matrix, norm, table };
  struct Shape {
    std::size_t rows = 0;  // of a norm 1
    std::size_t cols = 0;
    Kind kind = Kind::matrix;
    bool vocabulary = false;  // a row for each token: adapters that bring tokens have more of them
  };

  // A dense matrix, norm or table of rows, or the experts of an MoE layer; dense ones first.
  int add(const std::string& name, Shape shape);
  void add_experts(int layer, int experts, std::size_t hidden_size, std::size_t intermediate_size);

  int count() const noexcept { return count_; }
  // By the bundle's name: "layers.0.attention.q", "layers.0.experts.3.gate", "output", "final_norm",
  // "embedding". Error{invalid_argument} where the model has no such tensor, or none that an adapter can
  // change.
  int find(std::string_view name) const;
  Shape shape(int target) const noexcept;
  // REQUIRES experts of this layer.
  int expert(int layer, int expert, ExpertPart part) const noexcept {
    return layers_[static_cast<std::size_t>(layer)].first + 3 * expert + static_cast<int>(part);
  }

 private:
  struct Layer {
    int first = 0;  // target of expert 0's gate
    int experts = 0;
    Shape gate, down;
  };
  int find_expert(std::string_view name) const;  // -1: none

  std::map<std::string, int, std::less<>> dense_;
  std::vector<Shape> shapes_;  // of the dense ones
  std::vector<Layer> layers_;  // by layer number of the recipe; of those without experts 0
  int count_ = 0;
};

}  // namespace edgert
