/*
 * Sends a message many times and reports how long the replies took.
 * usage: load PORT FILE SESSIONS MESSAGES each|many|hold
 *
 * FILE is a message.  Its lines end with CRLF, and none begins with a dot.
 * SESSIONS sessions at a time send MESSAGES messages in all:
 *
 *	each	a session for each message
 *	many	many messages in each session; all sessions are open before
 *		the first message
 *	hold	a session for each message, which stays open; SESSIONS counts
 *		only the sessions that are sending
 *
 * The program prints a line and waits for one before the messages (not with
 * hold) and after them, so that only the messages are measured.  The last line
 * has the median and the 99th percentile of the times from the final dot to the
 * reply, in microseconds.
 *
 * A command or a message is one write(2) if there is room.  TCP_NODELAY is set,
 * because otherwise the client's wait for an ACK would count as the program's
 * time.  At most four sessions at a time await the greeting, because some
 * programs have a short listen backlog.
 */

#include "common.h"

#define GREETINGS	4
#define SILENCE	20000		/* ms after which the program counts as hung */

enum { GREETING, EHLO, MAIL, RCPT, DATA, BODY, QUIT, END };

/* The text to send, and the beginning of the reply. */
static struct step {
	const char	*text;
	size_t		 len;
	const char	*reply;
} steps[END] = {
	[GREETING]	= { "", 0, "220" },
	[EHLO]		= { "EHLO bench\r\n", 12, "250" },
	[MAIL]		= { "MAIL FROM:<a@example.com>\r\n", 27, "250" },
	[RCPT]		= { "RCPT TO:<b@example.com>\r\n", 25, "250" },
	[DATA]		= { "DATA\r\n", 6, "354" },
	[BODY]		= { NULL, 0, "250" },
	[QUIT]		= { "QUIT\r\n", 6, "221" },
};

struct conn {
	int		 fd;
	int		 step;
	size_t		 at;		/* bytes of the step that are sent */
	uint64_t	 dot;		/* when the whole message was sent */
	char		 in[1024];
	size_t		 len;
};

static uint64_t *took;
static struct conn **ready;		/* with many: open, no message yet */
static size_t todo, done;
static int port, sessions, working, ungreeted, nready;
static char mode;			/* the first letter of its name */

/* Returns the time in nanoseconds. */
static uint64_t
now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void
start(void)
{
	struct conn *c;

	if ((c = calloc(1, sizeof(*c))) == NULL)
		die("calloc");
	c->fd = begin_connect(port);
	watch(c->fd, c, EPOLL_CTL_ADD, EPOLLIN);
	todo--;
	working++;
	ungreeted++;
}

static void
send_step(struct conn *c)
{
	const struct step *s = &steps[c->step];
	ssize_t n = write(c->fd, s->text + c->at, s->len - c->at);

	if (n == -1 && errno != EAGAIN)
		die("write");
	if (n > 0)
		c->at += n;
	if (c->at < s->len)
		watch(c->fd, c, EPOLL_CTL_MOD, EPOLLOUT);
	else {
		if (c->step == BODY)
			c->dot = now();
		if (n < (ssize_t)s->len)	/* not in one write */
			watch(c->fd, c, EPOLL_CTL_MOD, EPOLLIN);
	}
}

/* Print a line, wait for one or for the end of standard input. */
static void
report(const char *line)
{
	char c;

	puts(line);
	fflush(stdout);
	(void)!read(0, &c, 1);
}

/* The reply to the current step is complete, so go on to the next. */
static void
next_step(struct conn *c)
{
	int i;

	if (c->step == BODY) {
		took[done++] = now() - c->dot;
		if (mode == 'm' && todo > 0) {
			todo--;
			c->step = MAIL - 1;
		}
	}
	if (c->step == GREETING)
		ungreeted--;
	c->step++;
	c->at = c->len = 0;
	if (mode == 'm' && c->step == MAIL && nready < sessions) {
		ready[nready++] = c;
		if (nready < sessions)
			return;
		report("open");
		for (i = 0; i < nready; i++)
			send_step(ready[i]);
		return;
	}
	if (c->step < (mode == 'e' ? END : QUIT)) {
		send_step(c);
		return;
	}
	working--;
	if (mode == 'e') {
		close(c->fd);
		free(c);
	}
}

static void
receive(struct conn *c)
{
	const char *want = steps[c->step].reply;
	char *line;
	ssize_t n;

	n = read(c->fd, c->in + c->len, sizeof(c->in) - 1 - c->len);
	if (n == -1 && errno == EAGAIN)
		return;
	if (n <= 0) {
		fprintf(stderr, "closed while awaiting %s\n", want);
		exit(1);
	}
	c->len += n;
	c->in[c->len] = '\0';
	if (c->in[c->len - 1] != '\n')
		return;
	c->in[c->len - 1] = '\0';
	line = strrchr(c->in, '\n');
	line = line == NULL ? c->in : line + 1;
	c->in[c->len - 1] = '\n';
	if (strncmp(line, want, 3) != 0) {
		fprintf(stderr, "awaited %s, got %s", want, line);
		exit(1);
	}
	if (line[3] == ' ')
		next_step(c);
}

static void
load(const char *path)
{
	size_t size;
	char *p = read_file(path, 3, &size);

	memcpy(p + size, ".\r\n", 3);
	steps[BODY].text = p;
	steps[BODY].len = size + 3;
}

static int
compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

int
main(int argc, char *argv[])
{
	struct epoll_event ev[EVENTS];
	char line[64];
	size_t messages;
	int i, n;

	if (argc != 6)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	port = atoi(argv[1]);
	load(argv[2]);
	sessions = atoi(argv[3]);
	todo = messages = atol(argv[4]);
	mode = argv[5][0];
	if ((took = calloc(messages, sizeof(*took))) == NULL ||
	    (ready = calloc(sessions, sizeof(*ready))) == NULL)
		die("calloc");
	if ((epfd = epoll_create1(0)) == -1)
		die("epoll_create1");
	if (mode == 'e')
		report("start");
	while (todo > 0 || working > 0) {
		while (todo > 0 && working < sessions && ungreeted < GREETINGS)
			start();
		if ((n = epoll_wait(epfd, ev, EVENTS, SILENCE)) <= 0) {
			fprintf(stderr, "no reply for %d s\n", SILENCE / 1000);
			return 1;
		}
		for (i = 0; i < n; i++)
			if (ev[i].events & EPOLLOUT)
				send_step(ev[i].data.ptr);
			else
				receive(ev[i].data.ptr);
	}
	qsort(took, done, sizeof(*took), compare);
	snprintf(line, sizeof(line), "%.1f %.1f", took[done / 2] / 1e3,
	    took[(done * 99 + 99) / 100 - 1] / 1e3);
	report(line);
	return done != messages;
}
