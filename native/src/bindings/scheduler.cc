// Scheduler: requests in, events out, without the GIL in between.
#include "engine/scheduler.h"

#include <pybind11/stl.h>

#include "adapters/patch_set.h"
#include "bindings/bindings.h"
#include "platform/error.h"

namespace py = pybind11;

namespace edgert {
namespace {

std::optional<std::uint64_t> submit(Scheduler& scheduler, const Mix& adapters,
                                    std::vector<std::int32_t> prompt, std::shared_ptr<Sampler> sampler,
                                    std::int64_t max_tokens, std::vector<std::int32_t> ends, bool paced,
                                    std::shared_ptr<PatchSet> patches, std::size_t top_k) {
  Request request{mix_of(adapters, std::move(patches), top_k),
                  std::move(prompt),
                  std::move(sampler),
                  max_tokens,
                  std::move(ends),
                  paced};
  const py::gil_scoped_release released;
  return scheduler.submit(std::move(request));
}

const char* name(Finish finish) {
  switch (finish) {
    case Finish::none:
      return nullptr;
    case Finish::stop:
      return "stop";
    case Finish::length:
      return "length";
    case Finish::cancelled:
      return "cancelled";
    case Finish::error:
      return "error";
  }
  return nullptr;
}

py::dict statistics(const Scheduler& scheduler) {
  const SchedulerStatistics s = scheduler.statistics();
  py::dict out;
  out["requests_running"] = s.running;
  out["requests_waiting"] = s.waiting;
  out["requests_preempted"] = s.preempted;
  out["prompt_tokens"] = s.prompt_tokens;
  out["prefix_cache_hit_tokens"] = s.cached_tokens;
  out["steps"] = s.steps;
  return out;
}

}  // namespace

void bind_scheduler(py::module_& module) {
  py::class_<RequestEvent>(module, "RequestEvent")
      .def_readonly("request", &RequestEvent::request)
      .def_readonly("sample", &RequestEvent::sample)
      .def_property_readonly("finish_reason", [](const RequestEvent& e) { return name(e.finish); })
      .def_readonly("cached_tokens", &RequestEvent::cached_tokens)
      .def_readonly("queue_s", &RequestEvent::queue_s)
      .def("raise_error", [](const RequestEvent& e) {
        if (e.error) std::rethrow_exception(e.error);
      });
  py::class_<Scheduler>(module, "Scheduler")
      .def(py::init([](std::shared_ptr<Model> model, std::size_t queue) {
             return std::make_unique<Scheduler>(std::move(model), queue);
           }),
           py::arg("model"), py::kw_only(), py::arg("queue"))
      .def("submit", &submit, py::kw_only(), py::arg("adapters"), py::arg("prompt"), py::arg("sampler"),
           py::arg("max_tokens"), py::arg("ends"), py::arg("paced") = false, py::arg("patches") = py::none(),
           py::arg("top_k") = 0)
      .def("cancel", &Scheduler::cancel, py::arg("request"))
      .def("proceed", &Scheduler::proceed, py::arg("request"))
      .def("events", &Scheduler::events, py::call_guard<py::gil_scoped_release>())
      .def("close", &Scheduler::close, py::call_guard<py::gil_scoped_release>())
      .def("statistics", &statistics);
}

}  // namespace edgert
