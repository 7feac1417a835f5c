#include "platform/thread.h"

#include <pthread.h>
#include <signal.h>

#include <exception>
#include <utility>

#include "platform/error.h"

namespace edgert {

std::thread start_thread(const std::string& name, std::function<void()> body) {
  // A new thread inherits the mask: block here, so that it never runs without it.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread thread;
  std::string failure;
  try {
    thread = std::thread(std::move(body));
  } catch (const std::exception& error) {
    failure = error.what();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!thread.joinable()) throw Error(ErrorKind::io, "thread " + name + " did not start: " + failure);
  pthread_setname_np(thread.native_handle(), name.substr(0, 15).c_str());
  return thread;
}

}  // namespace edgert
