// Starting a thread of this library.
#pragma once

#include <functional>
#include <string>
#include <thread>

namespace edgert {

// A thread with a name (at most 15 characters are shown) that takes no signals, so that those of the
// process reach the threads of the host program. Error{io} where the system starts no more threads.
std::thread start_thread(const std::string& name, std::function<void()> body);

}  // namespace edgert
