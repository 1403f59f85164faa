/* keybroker-key SOCKET|- [PROFILE|- [PYTHON]]
 *
 * The helper in C, for those who start many at once (Linux). keybroker/asking.py is the reference:
 * this looks in the same places, says the same words and ends with the same statuses.
 *
 * Whatever is no plain answer is left to `keybroker get`, which PYTHON runs. Nothing is allocated,
 * and each buffer has room for the most that may be in it.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/times.h>
#include <sys/un.h>
#include <unistd.h>

/* No answer, nobody to give one; ticks of times(), 100 a second on Linux; bytes; characters. */
enum { NONE = -1, NOBODY = -2, FIRST = 200, ALL = 800, REQUEST = 1024, REPLY = 16400, TEXT = 200 };

static int say(int status, const char *line) { dprintf(2, "%s\n", line); return status; }

/* Wait until there is something to read, or a moment; say whether another try is worth it. */
static int again(int from, clock_t until) {
	if (errno != EAGAIN && errno != EINTR) return 0;
	poll(&(struct pollfd){from, POLLIN, 0}, 1, from < 0 ? 10 : 100);
	return times(NULL) <= until;
}

/* Find the daemon's socket; return how long its path is, which may be more than there is room. */
static int find(const char *named, char *path, size_t size) {
	const char *runtime = getenv("XDG_RUNTIME_DIR");
	struct stat users;
	if (*named == '/') return snprintf(path, size, "%s", named);
	if (runtime && *runtime == '/') return snprintf(path, size, "%s/keybroker/s", runtime);
	snprintf(path, size, "/run/user/%u", geteuid());
	if (lstat(path, &users) == 0 && S_ISDIR(users.st_mode) && users.st_uid == geteuid())
		return snprintf(path, size, "/run/user/%u/keybroker/s", geteuid());
	return snprintf(path, size, "/tmp/keybroker-%u/s", geteuid()); /* whose it is, ask() looks */
}

/* Write a request: whose child asks, how often that one does, where its settings are. */
static int request(char *line, const char *name) {
	const char *ttl = getenv("CLAUDE_CODE_API_KEY_HELPER_TTL_MS");
	const char *folder = getenv("CLAUDE_CONFIG_DIR"), *below = folder && *folder ? "" : "/.claude";
	size_t n = ttl ? strspn(ttl, "0123456789") : 0, size = REQUEST + 1;
	if (n == 0 || n > 15 || ttl[n]) ttl = getenv("CLAUDE_CODE_ENTRYPOINT") ? "300000" : "0";
	if (*below) folder = getenv("HOME") ? getenv("HOME") : "";
	int length = snprintf(line, size, "1 get %s %d %s %s%s\n", name, getppid(), ttl, folder, below);
	if (*folder == '/' && !strchr(folder, '\n') && length > 0 && length <= REQUEST) return length;
	return snprintf(line, size, "1 get %s %d %s\n", name, getppid(), ttl);
}

/* Print a key, or why there is none; `end` is the answer's last byte. */
static int tell(const char *reply, const char *end) {
	int key = !memcmp(reply, "ok ", 3), error = !memcmp(reply, "error ", 6), seen = 0;
	const char *text = key ? reply + 2 : error ? strchr(reply + 6, ' ') : NULL, *cut = end;
	if (!text || ++text >= end || *end != '\n' || (error && end - text > 4 * TEXT)) return NONE;
	for (const char *at = text; at < end; at++) {
		unsigned char byte = (unsigned char)*at;
		if (byte < ' ' + key || byte == 0x7f || (key && byte > 0x7f)) return NONE;
		if (byte == 0xc2 && (at[1] & 0xe0) == 0x80) return NONE; /* a control in UTF-8 */
		if ((byte & 0xc0) != 0x80 && ++seen == TEXT) cut = at;
	}
	for (clock_t until = times(NULL) + FIRST; key && text <= end;) {
		ssize_t wrote = write(1, text, (size_t)(end - text + 1));
		if (wrote > 0) text += wrote;
		else if (!again(-1, until)) return say(74, "keybroker: output: the key cannot be written");
	}
	if (key) return 0;
	int status = text == reply + 9 ? atoi(reply + 6) : 0;
	dprintf(2, "%.*s%s\n", (int)((seen > TEXT ? cut : end) - text), text, seen > TEXT ? "…" : "");
	return status >= 64 && status <= 78 ? status : 69;
}

static int ask(const char *path, const char *name) {
	static char line[REQUEST + 1], reply[5 + REPLY + 1]; /* `wait`, and a zero at its end */
	struct sockaddr_un at = {.sun_family = AF_UNIX};
	uid_t owner[3]; /* pid, uid, gid */
	clock_t start = times(NULL), until = start + FIRST;
	ssize_t wait = 0, got = 0, more, length = request(line, name);
	if ((size_t)find(path, at.sun_path, sizeof at.sun_path) >= sizeof at.sun_path) return NONE;
	int server = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	while (connect(server, (struct sockaddr *)&at, sizeof at) != 0) /* EAGAIN: its queue is full */
		if (!again(-1, until)) return errno == ENOENT || errno == ECONNREFUSED ? NOBODY : NONE;
	if (getsockopt(server, SOL_SOCKET, SO_PEERCRED, owner, &(socklen_t){sizeof owner}) != 0
	    || (owner[1] && owner[1] != geteuid()) || send(server, line, (size_t)length, 0) != length)
		return NONE;
	while (got == wait || (got < REPLY + wait && reply[got - 1] != '\n')) {
		more = recv(server, reply + got, (size_t)(REPLY + wait - got), 0);
		if (more == 0 || (more < 0 && !again(server, until))) return NONE;
		if (more > 0) got += more, until = start + ALL;
		if (!memcmp(reply, "wait\n", 5)) wait = 5;
	}
	return tell(reply + wait, reply + got - 1);
}

int main(int argc, char **argv) {
	char *path = argc > 1 ? argv[1] : "", *profile = argc > 2 ? argv[2] : "-";
	char *python = argc > 3 ? argv[3] : "", *name = strcmp(profile, "-") ? profile : NULL;
	prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), signal(SIGPIPE, SIG_IGN); /* no core; told by write() */
	if (argc > 4 || (*path != '/' && strcmp(path, "-")) || (name && (strchr("_-", *name)
	    || strlen(name) > 32 || name[strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_-")])))
		return say(2, "keybroker: helper: needs a socket's path or -, and a profile's name");
	if (fcntl(1, F_GETFD) < 0) return say(74, "keybroker: output: stdout is closed");
	int status = *path == '-' && getenv("KEYBROKER_CONFIG") ? NOBODY : ask(path, profile);
	if (status >= 0) return status;
	char *how = status == NOBODY ? NULL : "--unanswered";
	if (!strcmp(path, "/run/keybroker/s")) how = "--system"; /* the daemon of a shared host */
	char *get[] = {python, "-I", "-c", "from keybroker.cli import main; main()", "get",
	               how ? how : name, how ? name : NULL, NULL};
	close(0); /* the client's stdin never ends; what is opened next takes its place */
	if (open("/dev/null", O_RDWR) == 0) execv(python, get);
	return say(69, "keybroker: helper: nobody answers, and keybroker get cannot be started");
}
