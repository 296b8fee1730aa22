// Which stream a group's next call may be launched on.
#pragma once

namespace fusedcomm::gpu {

// Two kernels of a group that ran at the same time would use the same slots. Python puts streams in order
// (fusedcomm/comm/streams.py) and opens the gate for the one it has seen to; a call on another one comes back undone.
// So a call on the stream of the call before costs Python nothing.
class StreamGate {
 public:
  // `once`: for one call.
  void open(void* stream, bool once) {
    stream_ = stream;
    is_open_ = true;
    once_ = once;
  }
  bool admits(void* stream) {
    if (!is_open_ || stream != stream_) return false;
    is_open_ = !once_;
    return true;
  }

 private:
  void* stream_ = nullptr;
  bool is_open_ = false;
  bool once_ = false;
};

}  // namespace fusedcomm::gpu
