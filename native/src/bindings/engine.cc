// Runtime, sampler and sequence; the model has a file of its own.
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <span>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/buffer.h"
#include "engine/runtime.h"
#include "engine/sampler.h"
#include "model/kv_cache.h"
#include "platform/error.h"

namespace py = pybind11;

namespace edgert {

IoBackend io_backend(const std::string& word) {
  if (word == "auto" || word == "pread") return IoBackend::pread;
  if (word == "io_uring") return IoBackend::io_uring;
  throw Error(ErrorKind::invalid_argument, "io_backend: found '" + word + "', allowed auto, pread, io_uring");
}

namespace {

DirectIo direct_io(const std::string& word) {
  if (word == "auto") return DirectIo::automatic;
  if (word == "on") return DirectIo::on;
  if (word == "off") return DirectIo::off;
  throw Error(ErrorKind::invalid_argument, "direct_io: found '" + word + "', allowed auto, on, off");
}

void bind_runtime(py::module_& module) {
  py::class_<Charge>(module, "Charge");
  py::class_<Runtime, std::shared_ptr<Runtime>>(module, "Runtime")
      .def(py::init([](std::uint64_t memory_bytes, int threads, int io_threads, const std::string& backend,
                       const std::string& direct, const std::string& isa) {
             return std::make_shared<Runtime>(RuntimeOptions{memory_bytes, threads, io_threads,
                                                             io_backend(backend), direct_io(direct), isa});
           }),
           py::arg("memory_bytes") = 0, py::kw_only(), py::arg("threads") = 0, py::arg("io_threads") = 4,
           py::arg("io_backend") = "auto", py::arg("direct_io") = "auto", py::arg("isa") = "")
      .def_property_readonly("budget_bytes", [](const Runtime& r) { return r.budget()->limit_bytes(); })
      .def_property(
          "active_threads", [](Runtime& r) { return r.pool().active(); }, &Runtime::set_active_threads)
      .def_property("io_depth", &Runtime::io_depth, &Runtime::set_io_depth)
      .def_property_readonly("used_bytes", [](const Runtime& r) { return r.budget()->used_bytes(); })
      .def_property_readonly("peak_bytes", [](const Runtime& r) { return r.budget()->peak_bytes(); })
      .def_property_readonly("threads", [](Runtime& r) { return r.pool().threads(); })
      .def_property_readonly("io_backend", [](Runtime& r) { return std::string(r.reader().name()); })
      .def_property_readonly("isa", [](const Runtime& r) { return std::string(r.kernel_table().name); })
      .def("reserve", &Runtime::reserve, py::arg("bytes"))
      .def(
          "charge",
          [](const Runtime& r, std::uint64_t bytes, const std::string& what) {
            return std::make_unique<Charge>(r.budget(), bytes, what);
          },
          py::arg("bytes"), py::arg("what"));
}

// For logits that another engine computed; the sampler works on a copy.
Sample sample(Sampler& sampler, const py::object& logits, std::int64_t position) {
  const BorrowedBuffer borrowed(logits, "logits");
  const std::span<const float> values = borrowed.as<const float>();
  if (values.empty()) throw Error(ErrorKind::invalid_argument, "logits: found none, at least one is needed");
  sampler.check(static_cast<int>(values.size()), "logits");
  std::vector<float> copy(values.begin(), values.end());
  std::vector<Candidate> space(copy.size());
  const Sample drawn = sampler.sample(copy, position, space);
  sampler.accept(std::span(&drawn.token, 1));
  return drawn;
}

void allow(Sampler& sampler, const py::object& mask) {
  if (mask.is_none()) return sampler.allow({});
  const BorrowedBuffer borrowed(mask, "mask");
  const std::span<const std::byte> bytes = borrowed.bytes();
  if (bytes.empty() || bytes.size() % sizeof(std::uint32_t) != 0) {
    throw Error(ErrorKind::invalid_argument,
                "mask: found " + std::to_string(bytes.size()) + " bytes, allowed are whole words of 4");
  }
  std::vector<std::uint32_t> words(bytes.size() / sizeof(std::uint32_t));  // the lender's may be unaligned
  std::memcpy(words.data(), bytes.data(), bytes.size());
  sampler.allow(words);
}

void bind_sampler(py::module_& module) {
  using Bias = std::map<std::int32_t, float>;
  py::class_<SamplerOptions>(module, "SamplerOptions")
      .def(py::init<>())
      .def_readwrite("temperature", &SamplerOptions::temperature)
      .def_readwrite("top_k", &SamplerOptions::top_k)
      .def_readwrite("top_p", &SamplerOptions::top_p)
      .def_readwrite("min_p", &SamplerOptions::min_p)
      .def_readwrite("repetition_penalty", &SamplerOptions::repetition_penalty)
      .def_readwrite("presence_penalty", &SamplerOptions::presence_penalty)
      .def_readwrite("frequency_penalty", &SamplerOptions::frequency_penalty)
      .def_readwrite("penalty_window", &SamplerOptions::penalty_window)
      .def_readwrite("seed", &SamplerOptions::seed)
      .def_readwrite("logprobs", &SamplerOptions::logprobs)
      .def_property(
          "logit_bias",
          [](const SamplerOptions& o) { return Bias(o.logit_bias.begin(), o.logit_bias.end()); },
          [](SamplerOptions& o, const Bias& bias) { o.logit_bias.assign(bias.begin(), bias.end()); });

  py::class_<Sample>(module, "Sample")
      .def_readonly("token", &Sample::token)
      .def_readonly("logprob", &Sample::logprob)
      .def_readonly("top", &Sample::top);

  py::class_<Sampler, std::shared_ptr<Sampler>>(module, "Sampler")
      .def(py::init<SamplerOptions, std::uint64_t>(), py::arg("options"), py::kw_only(),
           py::arg("stream") = 0)
      .def(
          "accept", [](Sampler& s, const std::vector<std::int32_t>& tokens) { s.accept(tokens); },
          py::arg("tokens"))
      .def("allow", &allow, py::arg("mask"))
      .def("sample", &sample, py::arg("logits"), py::arg("position"));
}

// Keeps steps out while a sequence is saved or restored.
KvSequence::Hold held(KvSequence& sequence) {
  KvSequence::Hold hold(sequence);
  if (!hold) throw Error(ErrorKind::invalid_argument, "the sequence is in a step that runs");
  return hold;
}

std::span<std::byte> saved_block(const KvSequence& sequence, std::int64_t index) {
  if (index < 0 || index >= sequence.num_blocks()) throw py::index_error();
  return sequence.saved_block(index);
}

py::bytes bytes_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void fill(std::span<std::byte> to, const py::object& content) {
  const BorrowedBuffer from(content, "content");
  if (from.bytes().size() != to.size()) {
    throw Error(ErrorKind::invalid_argument, "content: found " + std::to_string(from.bytes().size()) +
                                                 " bytes, allowed " + std::to_string(to.size()));
  }
  std::copy(from.bytes().begin(), from.bytes().end(), to.begin());
}

void bind_sequence(py::module_& module) {
  py::class_<KvSequence, std::shared_ptr<KvSequence>>(module, "Sequence")
      .def_property_readonly("length", &KvSequence::length)
      .def_property_readonly(
          "soft_tokens",
          [](const KvSequence& s) { return s.mix() == nullptr ? 0 : s.mix()->soft_prompt.size(); })
      .def_property_readonly(
          "fingerprint", [](const KvSequence& s) { return s.mix() == nullptr ? 0 : s.mix()->fingerprint(); })
      .def("rewind", &KvSequence::rewind, py::arg("length"))
      .def("close", [](KvSequence& s) { s.rewind(0); })
      .def("saved_length",
           [](KvSequence& s) {
             const auto hold = held(s);
             return s.saved_length();
           })
      .def(
          "saved_block",
          [](KvSequence& s, std::int64_t index) {
            const auto hold = held(s);
            return bytes_of(saved_block(s, index));
          },
          py::arg("index"))
      .def("saved_state",
           [](KvSequence& s) {
             const auto hold = held(s);
             return bytes_of(s.saved_state());
           })
      .def(
          "begin_restore",
          [](KvSequence& s, const std::vector<std::int32_t>& tokens) {
            const auto hold = held(s);
            if (s.length() != 0) throw Error(ErrorKind::invalid_argument, "the sequence is not empty");
            s.begin_restore(tokens);
          },
          py::arg("tokens"))
      .def(
          "restore_block",
          [](KvSequence& s, std::int64_t index, const py::object& content) {
            const auto hold = held(s);
            fill(saved_block(s, index), content);
          },
          py::arg("index"), py::arg("content"))
      .def(
          "restore_state",
          [](KvSequence& s, const py::object& content) {
            const auto hold = held(s);
            fill(s.saved_state(), content);
          },
          py::arg("content"))
      .def(
          "end_restore",
          [](KvSequence& s, std::int64_t length) {
            const auto hold = held(s);
            if (length < 0 || (length + kKvBlockTokens - 1) / kKvBlockTokens != s.num_blocks())
              throw Error(ErrorKind::invalid_argument, "length: is not what was begun with");
            s.end_restore(length);
          },
          py::arg("length"));
}

}  // namespace

void bind_engine(py::module_& module) {
  bind_runtime(module);
  bind_sampler(module);
  bind_sequence(module);
  bind_adapter(module);
  bind_model(module);
  bind_scheduler(module);
}

}  // namespace edgert
