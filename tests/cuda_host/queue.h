/* Inside the stand-in for CUDA: work that is done late. A stream with a queue shows what a host
 * that does not wait for it gets to see, which a stream that does its work at once hides. */
#ifndef TESTS_CUDA_HOST_QUEUE_H
#define TESTS_CUDA_HOST_QUEUE_H

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

/* Does work in its order on a thread of its own: as soon as somebody waits for it, else when it has
 * lain for a while. (A rank may wait for another that waits for the work.) */
class HostQueue {
  public:
    HostQueue(int device, std::chrono::milliseconds late);
    ~HostQueue(); /* does what is left */
    void push(std::function<void()> work);
    size_t pushed();           /* how many there were so far */
    bool done(size_t count);   /* whether the first `count` are */
    void finish(size_t count); /* waits for them */
    const int device;

  private:
    using Clock = std::chrono::steady_clock;
    struct Item {
        std::function<void()> work;
        Clock::time_point due;
    };
    void run();
    const std::chrono::milliseconds late;
    std::mutex lock;
    std::condition_variable changed;
    std::deque<Item> items;
    size_t count_pushed = 0, count_done = 0, wanted = 0;
    bool ends = false;
    std::thread worker;
};

#endif
