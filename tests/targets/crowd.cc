/*
 * C++ threads that a debugger can be asked about: each waits below frames of templates, lambdas,
 * catch blocks or an exception on its way up, and has a thread_local of its own.
 *
 * No options, no commands. Built without optimisation.
 */
#include <csignal>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

std::map<std::string, std::vector<int>> global_table{ { "odd", { 1, 3, 5 } }, { "even", { 2, 4 } } };
volatile long global_marker = 0x5eed;
thread_local volatile long own_marker;

namespace
{

std::mutex lock;
std::condition_variable changed;
bool done;
long waiting;

template <typename Item> class Queue {
	std::deque<Item> items;

public:
	/* The innermost frame of all threads. Nothing is ever put in. */
	void await_item()
	{
		std::unique_lock held(lock);

		waiting++;
		changed.notify_all();
		changed.wait(held, [this] { return done || !items.empty(); });
	}
};

template <int depth> void descend(Queue<std::string> &queue)
{
	if constexpr (depth)
		descend<depth - 1>(queue);
	else
		queue.await_item();
}

struct Guard {
	Queue<std::string> &queue;

	~Guard()
	{
		queue.await_item();
	}
};

void raise(const std::string &why)
{
	throw std::runtime_error(why);
}

void in_templates(Queue<std::string> &queue)
{
	descend<5>(queue);
}

void in_lambda(Queue<std::string> &queue)
{
	std::function<void(int)> again = [&](int left) { left ? again(left - 1) : queue.await_item(); };

	again(3);
}

void in_handler(Queue<std::string> &queue)
{
	try {
		raise("caught");
	} catch (const std::exception &error) {
		queue.await_item();
	}
}

/* The unwinder has the exception in hand while the destructor waits. */
void in_unwinding(Queue<std::string> &queue)
{
	try {
		Guard guard{ queue };

		raise("on its way");
	} catch (const std::exception &error) {
	}
}

struct Worker {
	const char *name;
	void (*run)(Queue<std::string> &);
	pid_t tid;
};

Worker workers[] = { { "in_templates", in_templates, 0 },
		     { "in_lambda", in_lambda, 0 },
		     { "in_handler", in_handler, 0 },
		     { "in_unwinding", in_unwinding, 0 } };

} // namespace

int main(int, char **argv)
{
	std::vector<std::thread> threads;
	Queue<std::string> queue;
	sigset_t term;
	int signal;

	sigemptyset(&term);
	sigaddset(&term, SIGTERM);
	pthread_sigmask(SIG_BLOCK, &term, nullptr);
	std::ofstream out(argv[1]);

	own_marker = 1000;
	for (Worker &worker : workers)
		threads.emplace_back([&] {
			worker.tid = gettid();
			own_marker = worker.tid;
			worker.run(queue);
		});
	{
		std::unique_lock held(lock);

		changed.wait(held, [] { return waiting == (long)std::size(workers); });
	}
	out << "ready {\"pid\": " << getpid() << ", \"global_marker\": "
	    << reinterpret_cast<uintptr_t>(&global_marker) << ", \"threads\": [";
	for (const Worker &worker : workers)
		out << (&worker == workers ? "" : ", ") << "{\"tid\": " << worker.tid
		    << ", \"function\": \"" << worker.name << "\"}";
	out << "]}" << std::endl;

	sigwait(&term, &signal);
	{
		std::unique_lock held(lock);

		done = true;
	}
	changed.notify_all();
	for (std::thread &thread : threads)
		thread.join();
	return global_marker != 0x5eed;
}
