/* load SOCKET CLIENTS REQUESTS PAUSE_MS KEY
 *
 * Ask REQUESTS times for the profile "work", CLIENTS at a time: connect, send the line, read until
 * the server closes, rest PAUSE_MS, again. An answer counts when it is "ok KEY" and a newline; a
 * refused connection, another answer and one that has not come after a minute are failures.
 * Prints one line of JSON. Times are of whole requests, from before connect to the end.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char request[] = "1 get work 0 0\n";
static const double patience = 60;

struct client {
	int socket;
	double began, rests_until;
	size_t have;
	char answer[16401];
};

static struct sockaddr_un name = {.sun_family = AF_UNIX};
static char expected[16400];
static size_t size;
static int poller;
static long started, answered;
static double *taken;

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* Return whether the client has a request under way. */
static int start(struct client *client)
{
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};

	started++;
	client->have = 0;
	client->began = now();
	client->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (client->socket < 0)
		err(1, "socket");
	if (!connect(client->socket, (void *)&name, sizeof name) &&
	    send(client->socket, request, sizeof request - 1, MSG_NOSIGNAL) == sizeof request - 1 &&
	    !epoll_ctl(poller, EPOLL_CTL_ADD, client->socket, &event))
		return 1;
	close(client->socket);
	return 0;
}

/* Return whether the request is over. */
static int go_on(struct client *client)
{
	ssize_t got;

	while ((got = recv(client->socket, client->answer + client->have,
			   sizeof client->answer - client->have, MSG_DONTWAIT)) > 0)
		client->have += got;
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (got == 0 && client->have == size && !memcmp(client->answer, expected, size))
		taken[answered++] = now() - client->began;
	close(client->socket);
	return 1;
}

static int compare(const void *a, const void *b)
{
	double difference = *(const double *)a - *(const double *)b;
	return (difference > 0) - (difference < 0);
}

static double at(double share)
{
	return answered ? taken[(long)(share * (answered - 1))] : 0;
}

int main(int argc, char **argv)
{
	if (argc != 6 || strlen(argv[1]) >= sizeof name.sun_path)
		errx(2, "usage: load SOCKET CLIENTS REQUESTS PAUSE_MS KEY");
	strcpy(name.sun_path, argv[1]);
	long clients = atol(argv[2]), requests = atol(argv[3]), over = 0;
	double pause = atol(argv[4]) / 1e3;
	size = snprintf(expected, sizeof expected, "ok %s\n", argv[5]);
	struct client *all = calloc(clients, sizeof *all), **rests = calloc(clients, sizeof *rests);
	struct epoll_event *events = calloc(clients, sizeof *events);
	taken = calloc(requests, sizeof *taken);
	poller = epoll_create1(EPOLL_CLOEXEC);
	if (clients < 1 || requests < clients || !all || !rests || !events || !taken || poller < 0)
		errx(2, "load: needs at least as many requests as clients, and memory");

	/* The pause is the same for all, so who began to rest first is the first to go on. */
	long first = 0, resting = clients;
	for (long i = 0; i < clients; i++)
		rests[i] = &all[i];
	double begin = now(), end = begin + patience;
	while (over < requests && now() < end) {
		while (resting && started < requests && rests[first]->rests_until <= now()) {
			struct client *client = rests[first];
			if (start(client)) {
				first = (first + 1) % clients;
				resting--;
			} else {
				over++;
			}
		}
		int wait = resting && started < requests ? (pause ? 1 : 0) : 1000;
		int ready = over < requests ? epoll_wait(poller, events, clients, wait) : 0;
		for (int i = 0; i < ready; i++) {
			struct client *client = events[i].data.ptr;
			if (!go_on(client))
				continue;
			over++;
			client->rests_until = pause ? now() + pause : 0;
			rests[(first + resting++) % clients] = client;
		}
	}
	double seconds = now() - begin;
	qsort(taken, answered, sizeof *taken, compare);
	printf("{\"per_second\": %.1f, \"p50\": %.9f, \"p99\": %.9f, \"longest\": %.9f, "
	       "\"answered\": %ld, \"failed\": %ld}\n",
	       answered / seconds, at(0.5), at(0.99), at(1), answered, requests - answered);
}
