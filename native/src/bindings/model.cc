// Model: GIL release, interrupts, arrays.
#include "engine/model.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>

#include "adapters/patch_set.h"
#include "bindings/bindings.h"
#include "engine/sampler.h"
#include "platform/error.h"

namespace py = pybind11;

namespace edgert {
namespace {

using Tokens = std::vector<std::int32_t>;
using Row = std::tuple<std::shared_ptr<KvSequence>, Tokens, std::shared_ptr<Sampler>>;

// Lets Ctrl-C through while native code runs, without asking for the GIL at every layer.
class Interrupts {
 public:
  void operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(50)) return;
    last_ = now;
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

std::optional<KvType> kv_type(const std::string& word) {
  if (word == "auto") return std::nullopt;
  if (word == "f32") return KvType::f32;
  if (word == "f16") return KvType::f16;
  if (word == "int8") return KvType::int8;
  throw Error(ErrorKind::invalid_argument, "kv_format: found '" + word + "', allowed auto, f32, f16, int8");
}

const LossyMode& lossy_mode(const std::string& name) {
  std::string known;
  for (const LossyMode& mode : kLossyModes) {
    if (mode.knob == name) return mode;
    known.append(known.empty() ? "" : ", ").append(mode.knob);
  }
  throw Error(ErrorKind::invalid_argument, "knob " + name + " is no lossy mode; those are " + known);
}

std::map<std::string, double> lossy(const Model& model) {
  std::map<std::string, double> out;
  const LossyModes modes = model.lossy();
  for (const LossyMode& mode : kLossyModes) {
    if (modes.*mode.share > 0) out[std::string(mode.knob)] = modes.*mode.share;
  }
  return out;
}

LossyModes lossy_modes(const std::map<std::string, double>& shares) {
  LossyModes modes;
  for (const auto& [name, share] : shares) modes.*lossy_mode(name).share = static_cast<float>(share);
  return modes;
}

std::shared_ptr<Model> load(std::shared_ptr<Runtime> runtime, const std::string& path, std::int64_t context,
                            int parallel, int chunk, const std::string& kv_format,
                            const std::string& eviction_word, const std::string& prefetch_word,
                            std::uint64_t adapter_bytes, std::uint64_t expert_bytes,
                            const std::string& moments_word, const std::map<std::string, double>& shares) {
  const ModelOptions options{context,
                             parallel,
                             chunk,
                             kv_type(kv_format),
                             eviction(eviction_word),
                             prediction(prefetch_word),
                             moments(moments_word),
                             lossy_modes(shares),
                             adapter_bytes,
                             expert_bytes};
  const py::gil_scoped_release released;
  return std::make_shared<Model>(std::move(runtime), path, options, Interrupts());
}

const char* name(KvType type) {
  switch (type) {
    case KvType::f32:
      return "f32";
    case KvType::f16:
      return "f16";
    case KvType::int8:
      return "int8";
  }
  return "";
}

py::dict describe(const MemoryPlan& p) {
  py::dict out;
  out["context"] = p.context;
  out["chunk"] = p.chunk;
  out["dense_bytes"] = p.dense_bytes;
  out["kv_bytes"] = p.kv_bytes;
  out["state_bytes"] = p.state_bytes;
  out["observation_bytes"] = p.observation_bytes;
  out["scratch_bytes"] = p.scratch_bytes + p.sampler_bytes;
  out["slots_bytes"] = p.slots_bytes;
  out["expert_bytes"] = p.expert_bytes;
  out["token_bytes"] = p.token_bytes;
  out["minimum_bytes"] = p.minimum_bytes;
  out["resident_bytes"] = p.resident_bytes;
  return out;
}

py::dict plan_memory_of(Runtime& runtime, const std::string& path, std::int64_t context, int parallel,
                        int chunk, const std::string& kv_format, const std::string& eviction_word,
                        const std::string& prefetch_word) {
  const ModelOptions options{
      context, parallel, chunk, kv_type(kv_format), eviction(eviction_word), prediction(prefetch_word)};
  const auto plan = [&] {
    const py::gil_scoped_release released;
    const Bundle bundle = Bundle::open(path, DirectIo::off);
    return plan_memory(bundle, recipe_of(bundle), runtime, runtime.pool().threads(), options);
  };
  return describe(plan());
}

py::dict plan_weights(Runtime& runtime, const std::string& name, const std::string& recipe,
                      std::uint64_t dense_bytes, const std::string& key_format,
                      std::vector<std::vector<std::uint64_t>> expert_bytes, std::uint64_t join_bytes,
                      std::int64_t context, int parallel, int chunk, const std::string& kv_format,
                      const std::string& eviction_word, const std::string& prefetch_word) {
  const ModelOptions options{
      context, parallel, chunk, kv_type(kv_format), eviction(eviction_word), prediction(prefetch_word)};
  const WeightSizes weights{name, dense_bytes, format(key_format).id, std::move(expert_bytes), join_bytes, 0};
  return describe(plan_memory(weights, parse_recipe(Json::parse(recipe, name), name), runtime,
                              runtime.pool().threads(), options));
}

std::shared_ptr<KvSequence> sequence(Model& model, const Mix& adapters, const Tokens& prompt,
                                     std::shared_ptr<PatchSet> patches, std::size_t top_k) {
  AdapterMix mix = mix_of(adapters, std::move(patches), top_k);
  const py::gil_scoped_release released;
  return model.sequence(std::move(mix), prompt);
}

std::shared_ptr<PatchSet> patches(Model& model, const Mix& adapters) {
  const AdapterMix mix = mix_of(adapters);
  const py::gil_scoped_release released;
  return model.patches(mix);
}

std::vector<std::optional<Sample>> step(Model& model, const std::vector<Row>& rows) {
  std::vector<SampleRow> spans;
  for (const auto& [sequence, tokens, sampler] : rows) {
    if (!sequence)
      throw Error(ErrorKind::invalid_argument, "row " + std::to_string(spans.size()) + ": no sequence");
    spans.push_back({sequence.get(), tokens, sampler.get()});
  }
  const py::gil_scoped_release released;
  return model.sample(spans, Interrupts());
}

py::array_t<float> logits(Model& model, KvSequence& sequence, const Tokens& tokens) {
  const auto vocab = static_cast<std::size_t>(model.vocab_size(sequence));
  py::array_t<float> out({tokens.size(), vocab});
  float* data = out.mutable_data();
  const StepRow row{&sequence, tokens, Wanted::all};
  const py::gil_scoped_release released;
  model.step(
      std::span(&row, 1),
      [&](std::size_t, std::size_t token, std::span<float> values) {
        std::copy(values.begin(), values.end(), data + token * vocab);
      },
      Interrupts());
  return out;
}

py::array array_of(const Observation::Statistic& s) {
  if (s.values.empty()) {
    py::array_t<std::int64_t> out(s.shape);
    std::copy(s.counts.begin(), s.counts.end(), out.mutable_data());
    return out;
  }
  if (!s.mean) {
    py::array_t<double> out(s.shape);
    std::copy(s.values.begin(), s.values.end(), out.mutable_data());
    return out;
  }
  py::array_t<float> out(s.shape);
  float* to = out.mutable_data();
  const std::size_t share = s.values.size() / s.counts.size();
  for (std::size_t i = 0; i < s.values.size(); ++i) {
    const std::int64_t count = s.counts[i / share];
    to[i] = count == 0 ? 0.0F : static_cast<float>(s.values[i] / static_cast<double>(count));
  }
  return out;
}

py::tuple observed(const Model& model) {
  py::dict arrays;
  std::int64_t tokens = 0;
  const auto take = [&](const Observation& observation) {
    const py::gil_scoped_acquire held;
    tokens = observation.tokens();
    for (const auto& statistic : observation.statistics())
      arrays[py::str(statistic.name)] = array_of(statistic);
  };
  {
    const py::gil_scoped_release released;  // a step that wants the GIL comes first
    model.observed(take);
  }
  return py::make_tuple(tokens, arrays);
}

py::dict statistics(const Model& model) {
  const ModelStatistics s = model.statistics();
  py::dict out;
  out["expert_hits"] = s.experts.hits;
  out["expert_prefetch_hits"] = s.experts.prefetch_hits;
  out["expert_misses"] = s.experts.misses;
  out["evictions"] = s.experts.evictions;
  out["stall_s"] = s.experts.stall_s;
  out["bytes_read"] = s.bytes_read;
  out["patch_bytes_read"] = s.patch_bytes_read;
  out["expert_bytes_read"] = s.experts.demand_bytes + s.experts.prefetched_bytes;
  out["expert_bytes_prefetched"] = s.experts.prefetched_bytes;
  out["prefetches"] = s.experts.prefetches;
  out["prefetches_late"] = s.experts.prefetches_late;
  out["prefetches_wasted"] = s.experts.prefetches_wasted;
  out["expert_bytes_wasted"] = s.experts.wasted_bytes;
  out["predicted"] = s.preload.expected;
  out["predicted_used"] = s.preload.used;
  out["preload_steps"] = s.preload.steps;
  out["preload_steps_on"] = s.preload.steps_on;
  out["preload_on"] = s.preload.on;
  const KvBlocks::Counts blocks = model.kv().blocks();
  out["kv_blocks_free"] = blocks.free;
  out["kv_blocks_idle"] = blocks.idle;
  out["kv_blocks_cached"] = blocks.cached;
  out["prefill_tokens"] = s.prefill_tokens;
  out["prefill_s"] = s.prefill_s;
  out["decode_tokens"] = s.decode_tokens;
  out["decode_s"] = s.decode_s;
  out["experts_replaced"] = s.lossy.replaced;
  out["experts_skipped"] = s.lossy.skipped;
  out["experts_low_precision"] = s.lossy.low_precision;
  out["expert_base_reads"] = s.experts.base_reads;
  out["expert_refinements"] = s.experts.refinements;
  out["experts_resident"] = s.experts.resident;
  out["experts_prefetching"] = s.experts.prefetching;
  out["experts_total"] = s.experts.total;
  out["slot_bytes"] = s.experts.slot_bytes;
  out["slot_capacity_bytes"] = s.experts.capacity_bytes;
  return out;
}

std::vector<py::bytes> store(const Model& model) {
  std::vector<py::bytes> out;
  for (const auto& layer : model.residency()) {
    out.emplace_back(reinterpret_cast<const char*>(layer.data()), layer.size());
  }
  return out;
}

}  // namespace

void bind_model(py::module_& module) {
  module.def("plan_memory", &plan_memory_of, py::arg("runtime"), py::arg("path"), py::kw_only(),
             py::arg("context") = 0, py::arg("parallel") = 1, py::arg("chunk") = 0,
             py::arg("kv_format") = "auto", py::arg("eviction") = std::string(kEvictions[0]),
             py::arg("prefetch") = std::string(kPredictions[0]));
  module.def("plan_weights", &plan_weights, py::arg("runtime"), py::kw_only(), py::arg("name"),
             py::arg("recipe_json"), py::arg("dense_bytes"), py::arg("key_format"), py::arg("expert_bytes"),
             py::arg("join_bytes") = 0, py::arg("context") = 0, py::arg("parallel") = 1, py::arg("chunk") = 0,
             py::arg("kv_format") = "auto", py::arg("eviction") = std::string(kEvictions[0]),
             py::arg("prefetch") = std::string(kPredictions[0]));
  py::class_<Model, std::shared_ptr<Model>>(module, "Model")
      .def(py::init(&load), py::arg("runtime"), py::arg("path"), py::kw_only(), py::arg("context") = 0,
           py::arg("parallel") = 1, py::arg("chunk") = 0, py::arg("kv_format") = "auto",
           py::arg("eviction") = std::string(kEvictions[0]),
           py::arg("prefetch") = std::string(kPredictions[0]), py::arg("adapter_memory") = 0,
           py::arg("expert_memory") = 0, py::arg("moments") = "none",
           py::arg("lossy") = std::map<std::string, double>())
      .def_property_readonly("context", [](const Model& m) { return m.plan().context; })
      .def_property_readonly("chunk", [](const Model& m) { return m.plan().chunk; })
      .def_property_readonly("kv_format", [](const Model& m) { return name(m.plan().kv_type); })
      .def_property_readonly("eviction", [](const Model& m) { return name(m.eviction()); })
      .def_property_readonly("prefetch", [](const Model& m) { return name(m.prefetch()); })
      .def_property_readonly("vocab_size", [](const Model& m) { return m.recipe().vocab_size; })
      .def_property_readonly("minimum_bytes", [](const Model& m) { return m.plan().minimum_bytes; })
      .def_property_readonly("resident", [](const Model& m) { return m.plan().resident(); })
      .def("plan", [](const Model& m) { return describe(m.plan()); })
      .def("adapter", &make_adapter, py::arg("name"), py::arg("parts"), py::arg("order") = 0,
           py::arg("added_tokens") = 0)
      .def(
          "target",
          [](const Model& m, const std::string& name) {
            const Targets::Shape shape = m.target(name);
            return std::tuple(shape.kind == Targets::Kind::norm ? shape.cols : shape.rows, shape.cols);
          },
          py::arg("name"))
      .def("trim_adapters", &Model::trim_adapters, py::call_guard<py::gil_scoped_release>())
      .def("sequence", &sequence, py::arg("adapters") = Mix{}, py::arg("prompt") = Tokens{},
           py::arg("patches") = py::none(), py::arg("top_k") = 0)
      .def("forget_prefixes", &Model::forget_prefixes)
      .def_property_readonly("state_fingerprint", &Model::state_fingerprint)
      .def_property_readonly("kv_block_bytes", [](const Model& m) { return m.kv().layout().block_bytes; })
      .def_property_readonly("state_bytes",
                             [](const Model& m) { return m.kv().state_layout().floats * sizeof(float); })
      .def("patches", &patches, py::arg("adapters"))
      .def(
          "stored_adapter",
          [](const Model& m, const std::string& name, std::uint64_t order, std::uint64_t fingerprint) {
            return std::const_pointer_cast<Adapter>(m.stored_adapter(name, order, fingerprint));
          },
          py::arg("name"), py::arg("order"), py::arg("fingerprint"))
      .def("stored_patches", &stored_patches, py::arg("adapter"), py::arg("path"), py::arg("places"),
           py::arg("counts"), py::arg("keep"))
      .def("use_patches", &Model::use, py::arg("patches"), py::call_guard<py::gil_scoped_release>())
      .def("remove_patches", &Model::remove, py::arg("patches"), py::call_guard<py::gil_scoped_release>())
      .def("check_weights", &Model::check_weights, py::call_guard<py::gil_scoped_release>())
      .def("step", &step, py::arg("rows"))
      .def("logits", &logits, py::arg("sequence"), py::arg("tokens"))
      .def("cancel", &Model::cancel)
      .def("impose_routing", &Model::impose_routing, py::arg("experts"),
           py::call_guard<py::gil_scoped_release>())
      .def("lossy", &lossy, py::call_guard<py::gil_scoped_release>())
      .def(
          "set_lossy",
          [](Model& m, const std::map<std::string, double>& shares) { m.set_lossy(lossy_modes(shares)); },
          py::arg("shares"), py::call_guard<py::gil_scoped_release>())
      .def("set_memory", &Model::set_memory, py::arg("bytes"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("least_expert_bytes", &Model::least_expert_bytes)
      .def("set_expert_memory", &Model::set_expert_bytes, py::arg("bytes"),
           py::call_guard<py::gil_scoped_release>())
      .def("take_from_experts", &Model::take_from_experts, py::arg("bytes"),
           py::call_guard<py::gil_scoped_release>())
      .def("return_to_experts", &Model::return_to_experts, py::call_guard<py::gil_scoped_release>())
      .def("seek_room", &Model::seek_room, py::arg("on"))
      .def_property("prefetch_depth", &Model::prefetch_depth, &Model::set_prefetch_depth)
      .def_property("token_interval_ms", &Model::token_interval_ms, &Model::set_token_interval_ms)
      .def("step_times", &Model::step_times, py::arg("since") = 0)
      .def("force_preload", &Model::force_preload, py::arg("on"))
      .def("last_experts", &Model::last_experts, py::call_guard<py::gil_scoped_release>())
      .def("observed", &observed)
      .def("statistics", &statistics)
      .def("store", &store);
}

}  // namespace edgert
