/* Work that is done late: see queue.h. */
#include "queue.h"

#include <algorithm>

HostQueue::HostQueue(int of, std::chrono::milliseconds after)
    : device(of), late(after), worker([this] { run(); }) {
}

HostQueue::~HostQueue() {
    finish(pushed());
    {
        std::lock_guard<std::mutex> guard(lock);
        ends = true;
    }
    changed.notify_all();
    worker.join();
}

void HostQueue::push(std::function<void()> work) {
    std::lock_guard<std::mutex> guard(lock);
    items.push_back({std::move(work), Clock::now() + late});
    count_pushed++;
    changed.notify_all();
}

size_t HostQueue::pushed() {
    std::lock_guard<std::mutex> guard(lock);
    return count_pushed;
}

bool HostQueue::done(size_t count) {
    std::lock_guard<std::mutex> guard(lock);
    return count_done >= count;
}

void HostQueue::finish(size_t count) {
    std::unique_lock<std::mutex> guard(lock);
    wanted = std::max(wanted, count);
    changed.notify_all();
    changed.wait(guard, [&] { return count_done >= count; });
}

void HostQueue::run() {
    std::unique_lock<std::mutex> guard(lock);
    while (!ends) {
        if (items.empty()) {
            changed.wait(guard);
        } else if (wanted <= count_done && Clock::now() < items.front().due) {
            changed.wait_until(guard, items.front().due);
        } else {
            std::function<void()> work = std::move(items.front().work);
            items.pop_front();
            guard.unlock();
            work();
            work = nullptr; /* what it holds is let go before anybody hears of it */
            guard.lock();
            count_done++;
            changed.notify_all();
        }
    }
}
