// What each file of this folder registers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "adapters/overlay.h"
#include "storage/reader.h"

namespace edgert {

class Model;

void bind_errors(pybind11::module_& module);
void bind_quant(pybind11::module_& module);
void bind_split(pybind11::module_& module);
void bind_platform(pybind11::module_& module);
void bind_bundle(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_adapter(pybind11::module_& module);
void bind_model(pybind11::module_& module);
void bind_scheduler(pybind11::module_& module);
void bind_simulation(pybind11::module_& module);
void bind_control(pybind11::module_& module);
void bind_probe(pybind11::module_& module);

// What an adapter adds to each matrix, by the keys of AdapterSource.
std::shared_ptr<Adapter> make_adapter(const Model& model, const std::string& name,
                                      const std::vector<pybind11::dict>& parts, std::uint64_t order,
                                      std::size_t added_tokens);
// The patches of a stored adapter: target, offset and bytes of each in the file at `path`.
using StoredPlace = std::tuple<std::string, std::uint64_t, std::uint64_t>;
std::shared_ptr<PatchSet> stored_patches(Model& model, const std::shared_ptr<Adapter>& adapter,
                                         const std::string& path, const std::vector<StoredPlace>& places,
                                         const pybind11::dict& counts, bool keep);
// Adapters and their scales, as Python lists them; `patches` and `top_k` as AdapterMix has them.
using Mix = std::vector<std::pair<std::shared_ptr<Adapter>, float>>;
AdapterMix mix_of(const Mix& adapters, std::shared_ptr<PatchSet> patches = nullptr, std::size_t top_k = 0);

// As the knob names it; auto is what costs least where nothing was measured.
IoBackend io_backend(const std::string& word);

}  // namespace edgert
