/* spawn COUNT OUTPUT PROGRAM ARGUMENT...
 *
 * Start COUNT of a program at once, all appending to the file OUTPUT, and wait for the last to
 * end. Prints how long that took and how many failed as one line of JSON.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	posix_spawn_file_actions_t files;
	int status, failed = 0;

	if (argc < 4)
		errx(2, "usage: spawn COUNT OUTPUT PROGRAM ARGUMENT...");
	posix_spawn_file_actions_init(&files);
	posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_addopen(&files, 1, argv[2], O_WRONLY | O_APPEND | O_CREAT, 0600);
	double began = now();
	for (int left = atoi(argv[1]); left > 0; left--)
		failed += posix_spawn(&(pid_t){0}, argv[3], &files, NULL, argv + 3, environ) != 0;
	while (wait(&status) > 0)
		failed += status != 0;
	printf("{\"seconds\": %.9f, \"failed\": %d}\n", now() - began, failed);
}
