/*
 * A mail server that compares every message with what was sent.
 * usage: sink HEADER FILE... <&SOCKET >COUNTS
 *
 * Standard input is a listening socket.  Each FILE is a message whose lines
 * end with CRLF.  The messages differ in their first bytes.  HEADER, the line
 * that a filter adds at the end of the header section, must be in each
 * message.  Standard output is a file with a struct counts, which is kept up
 * to date.
 *
 * If a message differs, the connection is closed without a reply.
 */

#include <sys/mman.h>

#include <strings.h>

#include "common.h"

#define BUFSZ	(256 * 1024)
#define LINESZ	1024
#define MAILS	8

struct counts {
	uint64_t	good;		/* messages as they were sent */
	uint64_t	bad;
	uint64_t	sessions;	/* open now */
};

/* The bytes that must come after DATA, the final dot included. */
static struct mail {
	char	*text;
	size_t	 size;
} mails[MAILS];

struct conn {
	int		 fd;
	int		 data;		/* between DATA and the dot */
	const struct mail *mail;	/* NULL before the first byte */
	size_t		 at;		/* bytes of it that have arrived */
	char		 line[LINESZ];	/* a command without its end */
	size_t		 len;
};

static struct counts *counts;

static void
load(struct mail *m, const char *header, const char *path)
{
	size_t n, len = strlen(header);
	char *p;

	m->text = read_file(path, len + 4, &n);
	m->size = n + len + 3;
	if ((p = strstr(m->text, "\r\n\r\n")) == NULL)
		die(path);
	p += 2;
	memmove(p + len, p, m->text + n - p);
	memcpy(p, header, len);
	memcpy(m->text + n + len, ".\r\n", 3);
}

/* Take bytes of a message.  Returns their number, or -1 if they differ. */
static ssize_t
take(struct conn *c, const char *p, size_t len)
{
	const struct mail *m = c->mail;

	for (m = m == NULL ? mails : m; m->text[c->at] != *p; m++)
		if (c->mail != NULL || m[1].text == NULL)
			return -1;
	c->mail = m;
	if (len > m->size - c->at)
		len = m->size - c->at;
	if (memcmp(m->text + c->at, p, len) != 0)
		return -1;
	c->at += len;
	return len;
}

static const char *
answer(struct conn *c)
{
	static const struct {
		const char *verb, *reply;
	} table[] = {
		{ "EHLO", "250-sink\r\n250-PIPELINING\r\n250-SIZE\r\n"
		    "250 8BITMIME\r\n" },
		{ "HELO", "250 sink\r\n" },
		{ "DATA", "354 go on\r\n" },
		{ "QUIT", "221 bye\r\n" },
		{ "", "250 ok\r\n" },
	};
	int i;

	for (i = 0; strncasecmp(c->line, table[i].verb,
	    strlen(table[i].verb)) != 0; i++)
		;
	c->data = i == 2;
	return table[i].reply;
}

/* Handle the bytes that were read.  Returns 0, or -1 to end the connection. */
static int
run(struct conn *c, const char *p, size_t len)
{
	char out[BUFSZ / 8];
	const char *end = p + len, *nl;
	size_t outlen = 0;
	ssize_t n;

	while (p < end) {
		const char *reply = NULL;

		if (c->data) {
			if ((n = take(c, p, end - p)) == -1) {
				counts->bad++;
				return -1;
			}
			p += n;
			if (c->at == c->mail->size) {
				counts->good++;
				c->data = 0;
				c->mail = NULL;
				c->at = 0;
				reply = "250 taken\r\n";
			}
		} else {
			nl = memchr(p, '\n', end - p);
			n = nl == NULL ? end - p : nl + 1 - p;
			if (c->len + n >= sizeof(c->line))
				return -1;
			memcpy(c->line + c->len, p, n);
			c->len += n;
			c->line[c->len] = '\0';
			p += n;
			if (nl != NULL) {
				reply = answer(c);
				c->len = 0;
			}
		}
		if (reply != NULL) {
			n = strlen(reply);
			if (outlen + n > sizeof(out))
				return -1;
			memcpy(out + outlen, reply, n);
			outlen += n;
		}
	}
	return outlen > 0 && write(c->fd, out, outlen) == -1 ? -1 : 0;
}

static void
readable(struct conn *c)
{
	static char buf[BUFSZ];
	ssize_t n = read(c->fd, buf, sizeof(buf));

	if (n == -1 && errno == EAGAIN)
		return;
	if (n > 0 && run(c, buf, n) == 0)
		return;
	if (c->data && n <= 0)
		counts->bad++;
	close(c->fd);
	free(c);
	counts->sessions--;
}

int
main(int argc, char *argv[])
{
	struct epoll_event ev[EVENTS];
	struct conn *c;
	int i, n, fd;

	if (argc < 3 || argc - 2 >= MAILS)
		return 2;
	for (i = 2; i < argc; i++)
		load(&mails[i - 2], argv[1], argv[i]);
	signal(SIGPIPE, SIG_IGN);
	if (ftruncate(1, sizeof(*counts)) == -1 ||
	    (counts = mmap(NULL, sizeof(*counts), PROT_READ | PROT_WRITE,
	    MAP_SHARED, 1, 0)) == MAP_FAILED)
		die("counts");
	if ((epfd = epoll_create1(0)) == -1)
		die("epoll_create1");
	watch(0, NULL, EPOLL_CTL_ADD, EPOLLIN);
	while ((n = epoll_wait(epfd, ev, EVENTS, -1)) != -1)
		for (i = 0; i < n; i++) {
			if ((c = ev[i].data.ptr) != NULL) {
				readable(c);
				continue;
			}
			fd = accept4(0, NULL, NULL, SOCK_NONBLOCK);
			if (fd == -1)
				continue;
			if ((c = calloc(1, sizeof(*c))) == NULL)
				die("calloc");
			c->fd = fd;
			watch(fd, c, EPOLL_CTL_ADD, EPOLLIN);
			/* if it fails, read(2) will fail, too */
			(void)!write(fd, "220 sink\r\n", 10);
			counts->sessions++;
		}
	die("epoll_wait");
}
