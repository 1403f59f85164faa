/* server SOCKET KEY
 *
 * What the daemon is measured against: accept, check the peer's uid, read one line, answer, close.
 * One client at a time, no limits, no ends of keys. Silent clients stop it.
 */
#define _GNU_SOURCE
#include <err.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	char answer[16400], line[1024];

	if (argc != 3 || strlen(argv[1]) >= sizeof name.sun_path)
		errx(2, "usage: server SOCKET KEY");
	strcpy(name.sun_path, argv[1]);
	int size = snprintf(answer, sizeof answer, "ok %s\n", argv[2]);
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0 || bind(listener, (void *)&name, sizeof name) || listen(listener, 4096))
		err(1, "%s", argv[1]);
	signal(SIGPIPE, SIG_IGN);
	for (;;) {
		struct ucred peer = {.uid = -1};
		socklen_t length = sizeof peer;
		ssize_t have = 0, got = 1;
		int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);

		getsockopt(client, SOL_SOCKET, SO_PEERCRED, &peer, &length);
		while (peer.uid == getuid() && got > 0 && !memchr(line, '\n', have)) {
			got = read(client, line + have, sizeof line - have);
			have += got > 0 ? got : 0;
		}
		if (have && memchr(line, '\n', have) && write(client, answer, size) != size)
			warn("write");
		close(client);
	}
}
