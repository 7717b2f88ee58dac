/*
 * The log, the clock, text, buffers, peers, addresses, the poll set, child
 * processes and the spool.  All socket reads and writes of a session are here.
 */

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <arpa/inet.h>
#include <netinet/tcp.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "clamsmtpd.h"

#define SPARE_BUFS	8
#define POLL_TIME	(60 * SECOND)	/* the longest sleep */
#define IDLE_TIME	SECOND		/* nothing was ready: tidy up */
#define NOMEM_PAUSE	100		/* ms; after malloc(3) has failed */
#define LOOKUP_LIMIT	(30 * SECOND)	/* for one look-up */
#define LOOKUP_RETRY	(5 * SECOND)	/* after one that was of no use */
#define KILL_TIME	(5 * SECOND)	/* from one signal to the next */

struct counters count;

/*
 * Text.
 */

/* Write n before end in digits of set, with leading zeros up to width.  Returns
 * the first digit. */
static char *
digits(char *end, unsigned long long n, unsigned base, int width,
    const char *set)
{
	char *p = end;

	do
		*--p = set[n % base];
	while ((n /= base) != 0);
	while (end - p < width)
		*--p = '0';
	return p;
}

/* Convert one argument; fmt begins with its `%'.  Returns the length of the text
 * at *p, and in *next the rest of the format. */
static size_t
convert(const char *fmt, va_list *ap, char number[32], const char **p,
    const char **next)
{
	char *end = number + 32, *q = end - 1;
	int width = 0, precision = INT_MAX, longs = 0;
	long long v;

	for (fmt++; *fmt >= '0' && *fmt <= '9'; fmt++)
		width = width * 10 + *fmt - '0';
	if (*fmt == '.') {
		precision = va_arg(*ap, int);
		fmt += 2;
	}
	for (; *fmt == 'l'; fmt++)
		longs++;
	*next = fmt + 1;
	switch (*fmt) {
	case 's':
		*p = va_arg(*ap, const char *);
		return strnlen(*p, precision);
	case 'd':
		v = longs == 0 ? va_arg(*ap, int) : longs == 1 ?
		    va_arg(*ap, long) : va_arg(*ap, long long);
		q = digits(end, v < 0 ? 0 - (unsigned long long)v :
		    (unsigned long long)v, 10, width, "0123456789");
		if (v < 0)
			*--q = '-';
		break;
	case 'u':
	case 'x':
	case 'X':
		q = digits(end, longs == 0 ? va_arg(*ap, unsigned) :
		    longs == 1 ? va_arg(*ap, unsigned long) :
		    va_arg(*ap, unsigned long long),
		    *fmt == 'u' ? 10 : 16, width, *fmt == 'x' ?
		    "0123456789abcdef" : "0123456789ABCDEF");
		break;
	case 'c':
		*q = va_arg(*ap, int);
		break;
	default:		/* %%; the compiler checks the others */
		*q = '%';
	}
	*p = q;
	return end - q;
}

size_t
vformat(char *to, size_t size, const char *fmt, va_list ap)
{
	va_list args;		/* if va_list is an array, &ap is no va_list * */
	char number[32];
	const char *p, *next;
	size_t n = 0, len;

	va_copy(args, ap);
	for (; *fmt != '\0'; fmt = next) {
		if (*fmt == '%')
			len = convert(fmt, &args, number, &p, &next);
		else {
			len = strcspn(fmt, "%");
			p = fmt;
			next = fmt + len;
		}
		if (len > size - 1 - n) {
			len = size - 1 - n;
			while (len > 0 && (p[len] & 0xc0) == 0x80)
				len--;	/* no half of a character */
			next = "";
		}
		memcpy(to + n, p, len);
		n += len;
	}
	va_end(args);
	to[n] = '\0';
	return n;
}

size_t
format(char *to, size_t size, const char *fmt, ...)
{
	va_list ap;
	size_t n;

	va_start(ap, fmt);
	n = vformat(to, size, fmt, ap);
	va_end(ap);
	return n;
}

size_t
text_char(const char *p, size_t n)
{
	const unsigned char *u = (const unsigned char *)p;
	size_t i, len = u[0] < ' ' || u[0] == 127 ? 0 : u[0] < 0x80 ? 1 :
	    u[0] >= 0xc2 && u[0] < 0xe0 ? 2 : (u[0] & 0xf0) == 0xe0 ? 3 :
	    u[0] >= 0xf0 && u[0] < 0xf5 ? 4 : 0;

	if (len == 0 || len > n)
		return 0;
	for (i = 1; i < len; i++)
		if ((u[i] & 0xc0) != 0x80)
			return 0;
	if ((u[0] == 0xc2 && u[1] < 0xa0) ||	/* C1, */
	    (u[0] == 0xe0 && u[1] < 0xa0) ||	/* overlong, */
	    (u[0] == 0xed && u[1] > 0x9f) ||	/* a surrogate, */
	    (u[0] == 0xf0 && u[1] < 0x90) ||
	    (u[0] == 0xf4 && u[1] > 0x8f))	/* beyond U+10FFFF */
		return 0;
	return len;
}

/* Promise 8: copy n bytes as text, for escape(), or for a string of JSON if
 * lowest is 0.  If a character would begin after last, "..." ends the copy.
 * Returns its end. */
static char *
text_copy(char *to, const char *last, const char *p, size_t n, int lowest)
{
	size_t len;

	for (; n > 0; p += len, n -= len) {
		if (to > last)
			return to + format(to, 4, "...");
		len = text_char(p, n);
		if (len == 0 || (len == 1 && *p < lowest)) {
			/* JSON has the two bytes of a C1 character as one. */
			len = lowest == 0 && n > 1 && *p == '\xc2' &&
			    (p[1] & 0xe0) == 0x80 ? 2 : 1;
			to += format(to, 8, lowest == 0 ? "\\u%04x" : "\\x%02X",
			    (unsigned char)p[len - 1]);
			continue;
		}
		if (lowest == 0 && (*p == '"' || *p == '\\'))
			*to++ = '\\';
		memcpy(to, p, len);
		to += len;
	}
	return to;
}

const char *
escape(const char *p, size_t n, int lowest)
{
	static char ring[4][LOGSZ];
	static int turn;
	char *b = ring[turn++ & 3];

	*text_copy(b, b + LOGSZ - 8, p, n, lowest) = '\0';
	return b;
}

int
parse_number(const char *p, const char *ends, int64_t *n)
{
	const char *digits = p;
	int fits = 1;

	for (*n = 0; *p >= '0' && *p <= '9'; p++)
		if (*n > (INT64_MAX - (*p - '0')) / 10)
			fits = 0;
		else
			*n = *n * 10 + (*p - '0');
	if (!fits)
		*n = INT64_MAX;
	return p == digits || strchr(ends, *p) == NULL ? -1 : fits;
}

void
ascii_clean(char *p, size_t n, const char *blanks, char mark)
{
	for (; n > 0; p++, n--)
		if ((*p <= ' ' || *p > 126) &&
		    (*p == '\0' || strchr(blanks, *p) == NULL))
			*p = mark;
}

/*
 * The log.
 */

static int log_fd = 2;
int log_level = LOG_WARNING;
int log_json;
int log_echo;
int log_held;
int log_wait = 5000;
static int log_syslog;			/* lines go to /dev/log, */
static int log_stream;			/* which is a stream socket */

/* The lines that wait, the oldest first.  Each is in its final form, or while
 * log_held is set a digit for the level and the text.  A NUL follows.  A line for
 * which there is no room is lost, and so are those after it until all others are
 * written.  Then a line says how many were lost. */
static char log_lines[BUFSZ];
static struct buf log_buf = { log_lines, 0, 0, sizeof log_lines };
static int log_begun;			/* a part of the first line is written */
static unsigned long long log_told;	/* of count.log_lost */

/* -d's 0..4 are syslog's LOG_ERR .. LOG_DEBUG. */
#define LEVEL_BASE	LOG_ERR

/* Most syslogds have a datagram socket, some a stream socket. */
static int
syslog_connect(void)
{
	static const struct sockaddr_un un = { AF_UNIX, "/dev/log" };
	static const int type[] = { SOCK_DGRAM, SOCK_STREAM };
	int fd, err;

	for (log_stream = 0; log_stream < 2; log_stream++) {
		fd = socket(AF_UNIX, type[log_stream] | SOCK_NONBLOCK |
		    SOCK_CLOEXEC, 0);
		if (fd == -1 ||
		    connect(fd, (const struct sockaddr *)&un, sizeof un) == 0)
			return fd;
		err = errno;
		close(fd);
		errno = err;
		if (errno != EPROTOTYPE)
			break;
	}
	return -1;
}

/* Promise 5: neither syslog nor a full pipe at stderr may stop the loop.  If
 * possible stderr is opened again, since O_NONBLOCK would otherwise affect all
 * processes that share it.  A regular file is not: it never blocks, and its
 * offset must stay shared. */
void
log_open(int level, int console)
{
	struct stat st;
	int fd = -1;

	if (!console && (fd = syslog_connect()) == -1)
		logmsg(LOG_WARNING, "/dev/log: no syslog daemon; up to 32 KiB "
		    "of log lines are kept until one starts:");
	else if (console && fstat(2, &st) == 0 && !S_ISREG(st.st_mode))
		fd = open("/proc/self/fd/2", O_WRONLY | O_APPEND |
		    O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	log_level = level + LEVEL_BASE;
	log_syslog = !console;
	log_fd = console && fd == -1 ? 2 : fd;
}

static ssize_t
log_put(const char *p, size_t n)
{
	struct pollfd room = { 2, POLLOUT, 0 };

	if (log_syslog)
		return send(log_fd, p, n, MSG_NOSIGNAL);
	/* If stderr could not be opened again it may block, so write only when
	 * there is room.  A pipe then has room for a whole line (PIPE_BUF). */
	if (log_fd == 2 && poll(&room, 1, 0) != 1) {
		errno = EAGAIN;
		return -1;
	}
	return write(log_fd, p, n);
}

/* Write the lines that wait until there is no room.  Returns how many could not
 * be written at all. */
static int
log_flush(void)
{
	static int64_t connect_at;	/* there was no syslog daemon before */
	struct pollfd room = { -1, POLLOUT, 0 };
	int connects = 1, failed = 0;
	size_t len;
	ssize_t n;

	while (buf_len(&log_buf) > 0) {
		if (log_syslog && log_fd == -1) {
			if (connects-- == 0 || now < connect_at)
				break;
			if ((log_fd = syslog_connect()) == -1) {
				connect_at = now + IDLE_TIME;
				break;
			}
		}
		/* In a stream a NUL ends a line, as with syslog(3). */
		len = strlen(buf_head(&log_buf)) + 1;
		n = log_put(buf_head(&log_buf), len - !log_stream);
		if (n == -1 && (errno == EAGAIN || errno == EINTR)) {
			room.fd = log_fd;
			if (log_wait > 0 && poll(&room, 1, log_wait) == 1)
				continue;
			log_wait = 0;
			break;
		}
		if (n == -1) {
			if (log_syslog) {
				close(log_fd);
				log_fd = -1;
				if (connects > 0 && !log_begun)
					continue;
			}
			failed++;	/* or the reader of its start is gone */
		}
		log_begun = n > 0 && (size_t)n < len - !log_stream;
		log_buf.r += log_begun ? (size_t)n : len;
	}
	if (buf_len(&log_buf) == 0)
		log_buf.r = log_buf.w = 0;
	return failed;
}

/* Returns 1 when standard error is a socket of systemd's journal, else 0. */
static int
is_journal(void)
{
	const char *v = getenv("JOURNAL_STREAM");
	char text[64];
	struct stat st;

	if (v == NULL || fstat(2, &st) == -1)
		return 0;
	format(text, sizeof text, "%llu:%llu", (unsigned long long)st.st_dev,
	    (unsigned long long)st.st_ino);
	return strcmp(v, text) == 0;
}

/* Append a line.  Returns 0, or -1 when there is no room. */
static int
log_add(int level, const char *text, size_t n)
{
	size_t size = n + 64;
	char *p;

	if (!buf_ready(&log_buf, size))
		return -1;
	p = log_buf.b + log_buf.w;
	if (log_held)
		size = format(p, size, "%d%.*s", level, (int)n, text);
	else if (log_syslog)
		/* Without a time stamp, which every syslogd then adds. */
		size = format(p, size, "<%d>clamsmtpd: %.*s",
		    LOG_MAIL | level, (int)n, text);
	else if (is_journal())		/* the journal adds its own tag */
		size = format(p, size, "<%d>%.*s\n", level, (int)n, text);
	else
		size = format(p, size, "%s%.*s\n",
		    log_json ? "" : "clamsmtpd: ", (int)n, text);
	log_buf.w += size + 1;
	return 0;
}

static void
log_line(int level, const char *text, size_t n)
{
	if (log_echo && level <= LOG_WARNING)
		(void)!(write(2, "clamsmtpd: ", log_json ? 0 : 11) +
		    write(2, text, n) + write(2, "\n", 1));
	if ((buf_len(&log_buf) > 0 && count.log_lost > log_told) ||
	    log_add(level, text, n) == -1)
		count.log_lost++;
	else
		count.log_lost += log_flush();
}

/* Write lines for which there was no room, or wait for room. */
static void
log_poll(void)
{
	unsigned long long lost = count.log_lost += log_flush();

	if (buf_len(&log_buf) == 0 && lost > log_told) {
		logmsg(LOG_WARNING, "%llu lines of the log were lost",
		    lost - log_told);
		if (count.log_lost == lost)
			log_told = lost;
		count.log_lost = lost;		/* this line does not count */
	}
	if (buf_len(&log_buf) > 0 && log_fd != -1)
		poll_add(log_fd, POLLOUT, NULL, NULL);
	else if (buf_len(&log_buf) > 0 || count.log_lost > log_told)
		poll_deadline(now + IDLE_TIME);
}

/*
 * JSON.  One line is built at a time, in json.
 */

static char json[JSONSZ];
static size_t json_n;

/* Append p as a JSON string that ends before json[end]. */
static void
json_string(const char *p, size_t n, size_t end)
{
	json[json_n++] = '"';
	json_n = text_copy(json + json_n, json + end - 12, p, n, 0) - json;
	json[json_n++] = '"';
}

static void
json_name(const char *name)
{
	json_n += format(json + json_n, 32, ",\"%s\":", name);
}

void
json_text(const char *name, const char *p, size_t n)
{
	json_name(name);
	json_string(p, n, json_n + JSONFIELD);
}

void
json_number(const char *name, long long v)
{
	json_name(name);
	json_n += format(json + json_n, 32, "%lld", v);
}

/* The last third of the line is left for the fields that follow. */
void
json_lines(const char *name, const char *p)
{
	char separator = '[';
	const char *end;

	if (p == NULL || *p == '\0')
		return;
	json_name(name);
	for (; *p != '\0'; p = end + 1, separator = ',') {
		end = strchr(p, '\n');
		json[json_n++] = separator;
		if (json_n + 6 * (end - p) > sizeof json * 2 / 3) {
			json_string("...", 3, sizeof json);
			break;
		}
		json_string(p, end - p, sizeof json);
	}
	json[json_n++] = ']';
}

void
json_begin(const struct session *s, int level)
{
	static const char *const names[] = {
		"error", "warning", "notice", "info", "debug"
	};

	json_n = format(json, sizeof json,
	    "{\"time\":\"%s\",\"level\":\"%s\"", rfc3339_date(time(NULL)),
	    names[level - LEVEL_BASE]);
	if (s != NULL)
		json_n += format(json + json_n, 32, ",\"session\":\"%06X\"",
		    s->id);
}

void
json_end(int level)
{
	json[json_n++] = '}';
	log_line(level, json, json_n);
}

void
slog(const struct session *s, int level, const char *fmt, ...)
{
	char line[LOGSZ];
	int err = errno;
	size_t n = 0;
	va_list ap;

	if (level > log_level)
		return;
	if (s != NULL && !log_json)
		n = format(line, sizeof line, "%06X: ", s->id);
	va_start(ap, fmt);
	n += vformat(line + n, sizeof line - n, fmt, ap);
	va_end(ap);
	if (fmt[strlen(fmt) - 1] == ':')
		n += format(line + n, sizeof line - n, " %s", strerror(err));
	if (log_held && log_add(level, line, n) == -1)
		log_format(log_json);		/* hold no more */
	if (log_held)
		;
	else if (log_json) {
		json_begin(s, level);
		json_name("message");
		json_string(line, n, sizeof json - 4);
		json_end(level);
	} else
		log_line(level, line, n);
	errno = err;
}

void
log_format(int as_json)
{
	char held[sizeof log_lines], *p = held;
	size_t n = log_held ? log_buf.w : 0;

	log_json = as_json;
	log_held = 0;
	memcpy(held, log_lines, n);
	log_buf.w -= n;
	for (; p < held + n; p += strlen(p) + 1)
		logmsg(*p - '0', "%s", p + 1);
}

/*
 * Text and time.
 */

const char *
user_name(void)
{
	static char name[64];
	struct passwd *pw;

	if (name[0] == '\0' && (pw = getpwuid(geteuid())) != NULL)
		format(name, sizeof name, "%s", pw->pw_name);
	else if (name[0] == '\0')
		format(name, sizeof name, "%lu", (unsigned long)geteuid());
	return name;
}

/* ms */
static int64_t
monotonic(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND + t.tv_nsec / 1000000;
}

const char *
rfc3339_date(time_t t)
{
	static char text[32];
	struct tm tm;

	gmtime_r(&t, &tm);
	format(text, sizeof text, "%04d-%02d-%02dT%02d:%02d:%02dZ",
	    tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday, tm.tm_hour,
	    tm.tm_min, tm.tm_sec);
	return text;
}

/*
 * Buffers.  All have one size, so that the memory of an empty one is used
 * again.  Only the pages that were touched take memory.
 */

/* The buffer that peer_fill() reads into.  Bodies of messages stay in it, and
 * only they need more than BUFSZ bytes. */
static char shared[BODYSZ] __attribute__((aligned(4096)));
static int shared_taken, shared_used;

static char *spare[SPARE_BUFS];
static int nspare;
static int nomem;		/* there was no memory for a buffer */

static char *
mem_get(void)
{
	char *b;

	if (nspare > 0)
		return spare[--nspare];
	if ((b = malloc(BUFSZ)) == NULL)
		nomem = 1;
	return b;
}

static void
mem_put(char *b)
{
	if (nspare < SPARE_BUFS)
		spare[nspare++] = b;
	else
		free(b);
}

/* Return the memory that an idle daemon does not need. */
static void
spares_free(void)
{
	while (nspare > 0)
		free(spare[--nspare]);
	if (shared_used)
		madvise(shared, sizeof shared, MADV_DONTNEED);
	shared_used = 0;
}

char *
buf_head(const struct buf *p)
{
	static char none[1];

	return p->b == NULL ? none : p->b + p->r;
}

int
buf_ready(struct buf *p, size_t n)
{
	if (p->b == NULL) {
		if ((p->b = mem_get()) == NULL)
			return 0;
		p->size = BUFSZ;
	}
	if (p->size - p->w < n && p->r > 0) {
		memmove(p->b, p->b + p->r, p->w - p->r);
		p->w -= p->r;
		p->r = 0;
	}
	return p->size - p->w >= n;
}

void
buf_put(struct buf *p, const void *data, size_t n)
{
	if (n > p->size - p->w)
		abort();	/* buf_ready() was not called */
	if (n > 0)
		memcpy(p->b + p->w, data, n);
	p->w += n;
}

void
buf_eat(struct buf *p, size_t n)
{
	p->r += n;
	if (p->r == p->w)
		buf_free(p);
}

void
buf_free(struct buf *p)
{
	if (p->b == NULL)
		return;
	if (p->b == shared)
		shared_taken = 0;
	else if (p->size == BUFSZ)
		mem_put(p->b);
	else
		free(p->b);
	*p = (struct buf){ NULL, 0, 0, 0 };
}

int
str_add(struct str *p, const char *data, size_t n)
{
	size_t size;
	char *s;

	if (p->size - p->len <= n) {
		size = (p->len + n + 1) * 3 / 2 + 48;
		if ((s = realloc(p->s, size)) == NULL)
			return -1;
		p->s = s;
		p->size = size;
	}
	memcpy(p->s + p->len, data, n);
	p->len += n;
	p->s[p->len] = '\0';
	return 0;
}

int
str_set(struct str *p, const char *data, size_t n)
{
	p->len = 0;
	return str_add(p, data, n);
}

void
str_free(struct str *p)
{
	free(p->s);
	memset(p, 0, sizeof *p);
}

/*
 * Peers.
 */

/* Reads go to the one shared buffer, unless the peer has unread input.  Input
 * that the session consumes in the same pass is never copied; peer_settle()
 * copies the rest. */
int
peer_fill(struct peer *p, int body)
{
	struct buf *in = &p->in;
	size_t room;
	ssize_t n;

	if (in->b == NULL && !shared_taken) {
		in->b = shared;
		in->size = body ? BODYSZ : BUFSZ;
		shared_taken = shared_used = 1;
	} else if (!buf_ready(in, 1))
		return 0;
	room = in->size - in->w;
	n = recv(p->fd, in->b + in->w, room < IO_MAX ? room : IO_MAX, 0);
	if (n > 0) {
		in->w += n;
		return 1;
	}
	if (buf_len(in) == 0)
		buf_free(in);
	if (n == -1 && (errno == EAGAIN || errno == EINTR))
		return 0;
	p->eof = 1;
	if (n == -1)
		p->err = 1;
	return 1;
}

int
peer_settle(struct peer *p)
{
	struct buf *in = &p->in, keep = { NULL, 0, 0, 0 };
	size_t n = buf_len(in);

	if (buf_len(&p->out) == 0)
		buf_free(&p->out);
	if (n == 0)
		buf_free(in);
	if (in->b == NULL || in->b != shared)
		return 0;
	keep.size = n > BUFSZ ? BODYSZ : BUFSZ;
	keep.b = n > BUFSZ ? malloc(BODYSZ) : mem_get();
	if (keep.b == NULL) {
		buf_free(in);
		return -1;
	}
	buf_put(&keep, in->b + in->r, n);
	buf_free(in);
	*in = keep;
	return 0;
}

/* Keep reading after an error of the connection: clamd explains why it stopped
 * reading. */
static int
send_failed(struct peer *p, int err)
{
	if (err == EAGAIN || err == EINTR)
		return 0;
	p->err = 1;
	if (err != EPIPE && err != ECONNRESET && err != ETIMEDOUT) {
		p->err = PEER_LOCAL;
		p->eof = 1;
	}
	buf_free(&p->out);
	return 1;
}

int
peer_drain(struct peer *p, int more)
{
	struct buf *out = &p->out;
	size_t n;
	ssize_t w;

	while ((n = buf_len(out)) > 0) {
		if (p->err) {
			buf_free(out);
			break;
		}
		if (n > IO_MAX)
			n = IO_MAX;
		w = send(p->fd, out->b + out->r, n,
		    MSG_NOSIGNAL | (more ? MSG_MORE : 0));
		if (w == -1)
			return send_failed(p, errno);
		buf_eat(out, w);
	}
	return 1;
}

/* Send by way of `out', for a file system without sendfile(2). */
static int
send_copy(struct peer *p, int fd, off_t *at, off_t n)
{
	ssize_t r;

	if (!buf_ready(&p->out, BUFSZ / 2))
		return 0;
	r = pread(fd, p->out.b + p->out.w, n < BUFSZ / 2 ? n : BUFSZ / 2, *at);
	if (r <= 0)
		return send_failed(p, EIO);
	p->out.w += r;
	*at += r;
	return peer_drain(p, 1);
}

int
peer_sendfile(struct peer *p, int fd, off_t *at, off_t n)
{
	if (p->err)
		return 1;
	if (n > IO_MAX)
		n = IO_MAX;
	switch (sendfile(p->fd, fd, at, n)) {
	case -1:
		if (errno == EINVAL || errno == ENOSYS)
			return send_copy(p, fd, at, n);
		return send_failed(p, errno);
	case 0:			/* the file has been cut short */
		return send_failed(p, EIO);
	}
	return 1;
}

/* shutdown() ends the connection even if a child still has the descriptor. */
void
peer_close(struct peer *p)
{
	if (p->fd != -1) {
		shutdown(p->fd, SHUT_RDWR);
		close(p->fd);
	}
	p->fd = -1;
	p->eof = p->err = p->connecting = 0;
	buf_free(&p->in);
	buf_free(&p->out);
}

int
peer_reset(struct peer *p)
{
	socklen_t len = sizeof(int);
	int err = 0;

	if (!p->err && getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &err,
	    &len) == 0 && err != 0)
		p->err = p->eof = 1;
	return p->err;
}

int
peer_peek(const struct peer *p)
{
	char c;
	ssize_t n = recv(p->fd, &c, 1, MSG_PEEK);

	if (n == -1 && (errno == EAGAIN || errno == EINTR))
		return 0;
	return n == 1 ? 1 : -1;
}

/*
 * Addresses.
 */

/* Write an IPv6 address (RFC 5952): the longest run of two or more zero groups
 * becomes "::".  Returns the length. */
static size_t
ipv6_format(char *to, size_t size, const unsigned char *ip)
{
	static const char zeros[] = ":0:0:0:0:0:0:0:0";
	char text[48], *run, *rest;
	size_t n = 0, i;

	for (i = 0; i < 16; i += 2)
		n += format(text + n, sizeof text - n, ":%x",
		    ip[i] << 8 | ip[i + 1]);
	for (i = 0; i <= 12; i += 2) {		/* a run of eight, ... two */
		if ((run = strstr(text, zeros + i)) == NULL)
			continue;
		rest = run + strlen(zeros + i);
		*run = '\0';
		return format(to, size, "%s::%s", text + (run > text),
		    rest + (*rest == ':'));
	}
	return format(to, size, "%s", text + 1);
}

static const unsigned char *
ip_bytes(const struct addr *a)
{
	return a->u.sa.sa_family == AF_INET ?
	    (const void *)&a->u.in.sin_addr : a->u.in6.sin6_addr.s6_addr;
}

const char *
addr_format(const struct addr *a, int with_port)
{
	static char ring[4][ADDRTEXT];
	static int turn;
	char *b = ring[turn++ & 3];
	const unsigned char *ip = ip_bytes(a);
	size_t n;

	if (a->len == 0)
		return "none";
	switch (a->u.sa.sa_family) {
	case AF_UNIX:
		if (a->len <= offsetof(struct sockaddr_un, sun_path))
			return "local";
		format(b, ADDRTEXT, "%s", a->u.un.sun_path);
		return b;
	case AF_INET:
		n = format(b, ADDRTEXT, "%d.%d.%d.%d", ip[0], ip[1], ip[2], ip[3]);
		break;
	default:
		n = format(b, ADDRTEXT, with_port ? "[" : "");
		n += ipv6_format(b + n, ADDRTEXT - n, ip);
		n += format(b + n, ADDRTEXT - n, with_port ? "]" : "");
	}
	if (with_port)
		format(b + n, ADDRTEXT - n, ":%u", addr_port(a));
	return b;
}

int
addr_equal(const struct addr *a, const struct addr *b)
{
	if (a->u.sa.sa_family == AF_UNIX)
		return a->len == b->len && memcmp(&a->u, &b->u, a->len) == 0;
	return a->u.in.sin_port == b->u.in.sin_port && addr_in(a, b,
	    a->u.sa.sa_family == AF_INET ? 32 : 128);
}

int
addr_in(const struct addr *a, const struct addr *net, int bits)
{
	const unsigned char *x = ip_bytes(a), *y = ip_bytes(net);
	int n = bits / 8, rest = bits % 8;

	if (a->u.sa.sa_family != net->u.sa.sa_family)
		return 0;
	return a->u.sa.sa_family == AF_UNIX || (memcmp(x, y, n) == 0 &&
	    (rest == 0 || (x[n] ^ y[n]) >> (8 - rest) == 0));
}

void
addr_unmap(struct addr *a)
{
	struct sockaddr_in6 six = a->u.in6;

	if (a->u.sa.sa_family != AF_INET6 ||
	    !IN6_IS_ADDR_V4MAPPED(&six.sin6_addr))
		return;
	memset(a, 0, sizeof *a);
	a->len = sizeof a->u.in;
	a->u.in.sin_family = AF_INET;
	a->u.in.sin_port = six.sin6_port;
	memcpy(&a->u.in.sin_addr, six.sin6_addr.s6_addr + 12, 4);
}

int
addr_ip(struct addr *a, const char *text, unsigned port)
{
	memset(a, 0, sizeof *a);
	if (inet_pton(AF_INET, text, &a->u.in.sin_addr) == 1) {
		a->u.in.sin_family = AF_INET;
		a->len = sizeof a->u.in;
	} else if (inet_pton(AF_INET6, text, &a->u.in6.sin6_addr) == 1) {
		a->u.in6.sin6_family = AF_INET6;
		a->len = sizeof a->u.in6;
	} else
		return -1;
	addr_set_port(a, port);
	addr_unmap(a);
	return 0;
}

int
addr_path(struct addr *a, const char *path)
{
	size_t n = strlen(path);

	memset(a, 0, sizeof *a);
	if (n >= sizeof a->u.un.sun_path)
		return -1;
	a->u.un.sun_family = AF_UNIX;
	memcpy(a->u.un.sun_path, path, n + 1);
	a->len = offsetof(struct sockaddr_un, sun_path) + n + 1;
	return 0;
}

int
addr_lookup(const char *name, unsigned port, struct addr addr[MAXADDRS])
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *list, *ai;
	int n = 0;

	if (getaddrinfo(name, NULL, &hints, &list) != 0)
		return 0;
	for (ai = list; ai != NULL && n < MAXADDRS; ai = ai->ai_next) {
		if (ai->ai_family != AF_INET && ai->ai_family != AF_INET6)
			continue;
		memset(&addr[n], 0, sizeof addr[n]);
		memcpy(&addr[n].u, ai->ai_addr, ai->ai_addrlen);
		addr[n].len = ai->ai_addrlen;
		addr_set_port(&addr[n], port);
		addr_unmap(&addr[n++]);
	}
	freeaddrinfo(list);
	return n;
}

int
peer_connect(struct peer *p, const struct addr *a, int64_t *deadline,
    int64_t ms)
{
	socklen_t len = sizeof(int);
	int err = 0, one = 1;

	if (p->fd == -1) {
		p->fd = socket(a->u.sa.sa_family,
		    SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (p->fd == -1 || connect(p->fd, &a->u.sa, a->len) == -1)
			err = errno;
		if (a->u.sa.sa_family != AF_UNIX)
			setsockopt(p->fd, IPPROTO_TCP, TCP_NODELAY, &one,
			    sizeof one);
		p->connecting = err == EINPROGRESS || err == EINTR;
		if (p->connecting)
			err = 0;
		if (err == 0)
			*deadline = now + ms;
	} else if (!p->connecting)
		getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &err, &len);
	else if (now >= *deadline)
		err = ETIMEDOUT;
	if (err == 0)
		return !p->connecting;
	peer_close(p);
	errno = err;
	return -1;
}

/*
 * Child processes.  A worker runs no other program.  It does what would stop
 * the loop (promise 5), which are look-ups and quarantine copies, and answers
 * through a pipe.  A VirusAction is a shell command in a process group of its
 * own; MAXACTIONS run at once, and the others wait.
 */

/* All descriptors of a worker.  Text that libc writes to standard error before
 * it aborts makes the answer wrong, and not the copy. */
enum { FROM, TO, ANSWER };

struct quarantine {
	struct spool from;		/* for the child only, as is dir */
	const char *dir;
	int	 to;
	char	 scratch[PATH_MAX], copy[PATH_MAX];
};

struct child {
	pid_t	 pid;			/* 0: not started yet, or reaped */
	int64_t	 deadline;		/* of its next signal */
	int	 signalled;
	struct child *next;

	/* A worker. */
	int	 fd;			/* of the pipe */
	void	(*done)(void *, const char *, size_t);
	void	*ctx;			/* NULL: the answer is not wanted */
	struct quarantine *files;	/* NULL: it is a look-up */
	size_t	 n;
	char	 answer[PATH_MAX];

	/* A VirusAction. */
	char	*command;		/* NULL: a worker */
	char	*env;
	unsigned id;			/* of its session, for the log */
	int64_t	 ms;			/* that it may take */
};
static struct child *children;		/* the oldest first */
int virusactions;

/* Close the descriptors from first on. */
static void
close_from(int first)
{
	struct dirent *entry;
	struct rlimit r;
	DIR *open_ones;
	int64_t fd;

#ifdef SYS_close_range
	if (syscall(SYS_close_range, first, ~0U, 0) == 0)
		return;
#endif
	/* RLIMIT_NOFILE may be a billion, so close those that are open. */
	if ((open_ones = opendir("/proc/self/fd")) != NULL) {
		while ((entry = readdir(open_ones)) != NULL) {
			if (parse_number(entry->d_name, "", &fd) == 1 &&
			    fd >= first && fd != dirfd(open_ones))
				close(fd);
		}
		closedir(open_ones);
		return;
	}
	getrlimit(RLIMIT_NOFILE, &r);
	for (; (rlim_t)first < r.rlim_cur; first++)
		close(first);
}

/* Handle, ignore and block no signal. */
static void
signals_default(void)
{
	sigset_t none;
	int sig;

	for (sig = 1; sig < 32; sig++)
		signal(sig, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

void
process_begin(int nkept)
{
	int fd;

	now = monotonic();
	signals_default();
	do
		fd = open("/dev/null", O_RDWR);
	while (fd >= 0 && fd <= 2);
	close_from(3 + nkept);
}

/* Signals are blocked during fork(), or the child would write those that all of
 * us get into the pipe of the daemon's handlers. */
static pid_t
fork_blocked(void)
{
	sigset_t all, before;
	pid_t pid;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &before);
	pid = fork();
	if (pid == 0)
		signals_default();
	else
		sigprocmask(SIG_SETMASK, &before, NULL);
	return pid;
}

static void
child_add(struct child *c)
{
	struct child **p;

	for (p = &children; *p != NULL; p = &(*p)->next)
		;
	*p = c;
}

static void
child_free(struct child *c)
{
	struct child **p;

	for (p = &children; *p != c; p = &(*p)->next)
		;
	*p = c->next;
	virusactions -= c->command != NULL;
	free(c->files);
	free(c->command);
	free(c->env);
	free(c);
}

static void
child_descriptor(int fd, int as)
{
	if (fd != -1 && dup2(fd, as) == -1)
		_exit(127);
}

/* A VirusAction gets the signal with all of its process group. */
static void
child_signal(struct child *c, int sig)
{
	kill(c->command != NULL ? -c->pid : c->pid, sig);
	c->signalled = 1;
	c->deadline = now + KILL_TIME;
}

/* Run work(arg) in a child.  When it has ended, done(ctx, answer, n) is called
 * with the n bytes that it wrote to ANSWER, and a NUL; n is 0 if it failed or
 * took longer than ms.  Then the files are removed, unless the answer is the name
 * of the copy and done was called.  Takes the files (NULL: none).  Returns NULL
 * and sets errno if there can be no child. */
static struct child *
child_start(void (*work)(void *), void *arg, struct quarantine *files,
    void (*done)(void *, const char *, size_t), void *ctx, int64_t ms)
{
	struct child *c = calloc(1, sizeof *c);
	int p[2] = { -1, -1 }, err;

	if (c == NULL)
		return NULL;
	if (pipe2(p, O_CLOEXEC | O_NONBLOCK) == -1 ||
	    (c->pid = fork_blocked()) == -1) {
		err = errno;
		close(p[0]);
		close(p[1]);
		free(c);
		errno = err;
		return NULL;
	}
	if (c->pid == 0) {
		child_descriptor(p[1], ANSWER);
		if (files != NULL) {
			child_descriptor(files->from.fd, FROM);
			child_descriptor(files->to, TO);
		}
		close_from(3);
		work(arg);
		_exit(0);
	}
	close(p[1]);
	c->fd = p[0];
	c->files = files;
	c->done = done;
	c->ctx = ctx;
	c->deadline = now + ms;
	child_add(c);
	return c;
}

void
child_forget(struct child *c)
{
	c->ctx = NULL;
}

/* Promise 7: a copy that no session has taken is removed.  The scratch file
 * becomes the copy by link() and unlink(), or by rename() in place of an empty
 * file.  So the copy is this child's, and not an older file of that name, if
 * the scratch file is gone, if both are one file, or if the copy is empty. */
static void
files_remove(const struct quarantine *q)
{
	struct stat a, b;

	if (stat(q->scratch, &a) == -1 || (stat(q->copy, &b) == 0 &&
	    (b.st_size == 0 || (a.st_dev == b.st_dev && a.st_ino == b.st_ino))))
		unlink(q->copy);
	unlink(q->scratch);
}

/* A worker that has closed its pipe runs no more, and has answered whatever it
 * can.  One that was killed has not. */
static void
on_worker(void *arg, int revents)
{
	struct child *c = arg;
	struct quarantine *q = c->files;
	ssize_t n;

	(void)revents;
	while ((n = read(c->fd, c->answer + c->n,
	    sizeof c->answer - 1 - c->n)) > 0)
		c->n += n;
	if (n == -1 && (errno == EAGAIN || errno == EINTR))
		return;
	close(c->fd);
	if (c->ctx != NULL)
		c->done(c->ctx, c->answer, c->signalled ? 0 : c->n);
	if (q != NULL) {
		if (c->ctx == NULL || c->signalled ||
		    strcmp(c->answer, q->copy) != 0)
			files_remove(q);
		run_all = 1;		/* another session may make a copy */
	}
	child_free(c);
}

static const char *
command_text(const struct child *c)
{
	return printable(c->command, strlen(c->command));
}

__attribute__((noreturn)) static void
virusaction_exec(const struct child *c)
{
	int none;
	const char *name, *value;

	for (name = c->env; *name != '\0'; name = value + strlen(value) + 1) {
		value = name + strlen(name) + 1;
		unsetenv(name);
		if (*value != '\0' && setenv(name, value, 1) == -1)
			_exit(127);
	}
	setpgid(0, 0);
	close_from(3);			/* leaves room for one more */
	none = open("/dev/null", O_RDWR | O_CLOEXEC);
	child_descriptor(none, 0);
	child_descriptor(none, 1);
	child_descriptor(none, 2);
	execl("/bin/sh", "sh", "-c", c->command, (char *)NULL);
	_exit(127);
}

static void
virusactions_run(void)
{
	struct child *c, *next;
	int running = 0;

	for (c = children; c != NULL && running < MAXACTIONS; c = next) {
		next = c->next;
		running += c->command != NULL;
		if (c->command == NULL || c->pid != 0)
			continue;
		switch (c->pid = fork_blocked()) {
		case -1:
			logmsg(LOG_ERR, "%06X: VirusAction: fork: %s: %s",
			    c->id, strerror(errno), command_text(c));
			child_free(c);
			running--;
			break;
		case 0:
			virusaction_exec(c);
		default:
			setpgid(c->pid, c->pid);	/* as the child does */
			c->deadline = now + c->ms;
		}
	}
}

void
virusaction_start(unsigned id, const char *command, char *env, int64_t ms)
{
	struct child *c = calloc(1, sizeof *c);
	char *text = strdup(command);

	if (virusactions >= MAXACTIONS + MAXWAITING)
		logmsg(LOG_ERR, "%06X: VirusAction: not run, %d are waiting: "
		    "%s", id, MAXWAITING, printable(command, strlen(command)));
	else if (c == NULL || text == NULL)
		logmsg(LOG_ERR, "%06X: VirusAction: not run: %s: %s", id,
		    strerror(errno), printable(command, strlen(command)));
	else {
		c->command = text;
		c->id = id;
		c->env = env;
		c->ms = ms;
		virusactions++;
		child_add(c);
		virusactions_run();
		return;
	}
	free(c);
	free(text);
	free(env);
}

static void
virusaction_end(struct child *c, int status)
{
	if (WIFSIGNALED(status))
		logmsg(LOG_WARNING, "%06X: VirusAction: killed by signal %d: %s",
		    c->id, WTERMSIG(status), command_text(c));
	else if (WEXITSTATUS(status) != 0)
		logmsg(LOG_WARNING, "%06X: VirusAction: exit status %d: %s",
		    c->id, WEXITSTATUS(status), command_text(c));
	if (c->signalled)		/* the time of its group is over, too */
		child_signal(c, SIGKILL);
	child_free(c);
}

static void
child_late(struct child *c)
{
	int sig = SIGKILL;

	if (c->command != NULL && !c->signalled) {
		logmsg(LOG_WARNING, "%06X: VirusAction: exceeded "
		    "TimeOut, stopped: %s", c->id, command_text(c));
		sig = SIGTERM;
	}
	child_signal(c, sig);
}

static void
children_poll(void)
{
	struct child *c;

	for (c = children; c != NULL; c = c->next) {
		if (c->command == NULL)
			poll_add(c->fd, 0, on_worker, c);	/* POLLHUP */
		if (c->pid == 0)
			continue;
		if (now >= c->deadline)
			child_late(c);
		poll_deadline(c->deadline);
	}
}

void
children_reap(void)
{
	struct child *c;
	pid_t pid;
	int status;

	do {
		pid = waitpid(-1, &status, WNOHANG);
		for (c = children; pid > 0 && c != NULL && c->pid != pid;)
			c = c->next;
		if (pid <= 0 || c == NULL)
			continue;
		if (c->command != NULL)
			virusaction_end(c, status);
		else
			c->pid = 0;	/* the number may be used again */
	} while (pid > 0 || (pid == -1 && errno == EINTR));
	virusactions_run();
}

void
children_kill(void)
{
	struct child *c;

	for (c = children; c != NULL; c = c->next) {
		if (c->command != NULL)
			logmsg(LOG_WARNING, "%06X: VirusAction: %s, the daemon "
			    "ends: %s", c->id, c->pid == 0 ? "not run" : "killed",
			    command_text(c));
		if (c->pid != 0) {
			child_signal(c, SIGKILL);
			waitpid(c->pid, NULL, 0);
		}
		if (c->files != NULL)
			files_remove(c->files);
	}
}

/*
 * Targets.
 */

static int
socket_exists(const struct addr *a)
{
	struct stat st;

	return a->u.sa.sa_family != AF_UNIX ||
	    stat(a->u.un.sun_path, &st) == 0;
}

/* Returns the index of the address, or naddr if the target does not have it. */
static int
target_index(const struct target *t, const struct addr *a)
{
	int i;

	for (i = 0; i < t->naddr && !addr_equal(&t->addr[i], a); i++)
		;
	return i;
}

void
target_worked(struct target *t, const struct addr *a)
{
	int i = target_index(t, a), was = t->first;

	if (i == t->naddr || i == was)
		return;
	t->first = i;
	if (socket_exists(&t->addr[was]))
		logmsg(LOG_NOTICE, "%s: %s works and is tried first from now on",
		    t->text, addr_text(a));
}

void
target_put(struct target *t)
{
	if (t == NULL || --t->refs > 0)
		return;
	free(t->text);
	free(t->name);
	free(t);
}

static void
lookup_work(void *arg)
{
	struct target *t = arg;
	struct addr addr[MAXADDRS];
	int n = addr_lookup(t->name, t->port, addr);

	(void)!write(ANSWER, addr, n * sizeof addr[0]);
}

static void
on_lookup(void *ctx, const char *answer, size_t n)
{
	struct target *t = ctx;
	struct addr worked = t->addr[t->first];

	t->resolving = 0;
	if (n == 0 || n % sizeof t->addr[0] != 0)
		logmsg(LOG_WARNING, "%s: no address found for this name%s",
		    t->text, t->naddr > 0 ? "; keeping the old one" : "");
	else {			/* the one that worked last stays first */
		memcpy(t->addr, answer, n);
		t->naddr = n / sizeof t->addr[0];
		t->first = target_index(t, &worked) % t->naddr;
	}
	run_all = 1;			/* a session may wait for the address */
	target_put(t);
}

void
target_resolve(struct target *t, int force)
{
	int64_t age = now - t->resolved_at;

	if (t->name == NULL || t->resolving)
		return;
	if (t->resolved_at != 0 && age < (force || t->naddr == 0 ?
	    LOOKUP_RETRY : LOOKUP_TIME))
		return;
	t->resolved_at = now;
	t->resolving = 1;
	t->refs++;
	if (child_start(lookup_work, t, NULL, on_lookup, t, LOOKUP_LIMIT) != NULL)
		return;
	logmsg(LOG_ERR, "%s: cannot start a child to resolve this name:",
	    t->text);
	t->resolving = 0;
	t->refs--;
}

int
target_next(struct target *t, unsigned tried)
{
	int i, n;

	target_resolve(t, 0);
	if (t->naddr == 0)
		return t->resolving ? RESOLVING : NO_ADDR;
	for (n = 0; n < t->naddr; n++) {
		i = (t->first + n) % t->naddr;
		if ((tried & 1U << i) == 0 &&
		    (t->naddr == 1 || socket_exists(&t->addr[i])))
			return i;
	}
	return tried == 0 ? t->first : NO_ADDR;
}

const char *
target_text(struct target *t)
{
	const struct addr *a;

	if (t->name != NULL || t->naddr <= 1)
		return t->text;
	a = &t->addr[target_next(t, 0)];
	return socket_exists(a) ? a->u.un.sun_path : t->text;
}

/*
 * The poll set, which is built again in each pass of the loop, and the sessions
 * that are to run whatever poll() returns.
 */

int64_t now;
int run_all;
struct session *runnable;		/* in the order of session_wake() */

static struct session **runnable_end = &runnable;
static struct pollfd *fds;
static struct handler {
	void	(*ready)(void *, int);
	void	*arg;
} *handlers;
static int nfds, fds_size;
static int64_t poll_until;

void
poll_add(int fd, int events, void (*ready)(void *, int), void *arg)
{
	int size = fds_size * 2 + 64;
	struct pollfd *f;
	struct handler *h;

	if (nfds == fds_size) {
		if ((f = realloc(fds, size * sizeof *f)) != NULL)
			fds = f;
		if ((h = realloc(handlers, size * sizeof *h)) != NULL)
			handlers = h;
		if (f == NULL || h == NULL) {
			nomem = 1;	/* the next pass adds it */
			return;
		}
		fds_size = size;
	}
	fds[nfds].fd = fd;
	fds[nfds].events = events;
	fds[nfds].revents = 0;
	handlers[nfds].ready = ready;
	handlers[nfds++].arg = arg;
}

void
poll_deadline(int64_t t)
{
	if (t != 0 && t < poll_until)
		poll_until = t;
}

int
poll_wait(void)
{
	static int64_t ready_at;
	int i, r, n;

	log_poll();
	children_poll();
	if (nspare > 0 || shared_used)
		poll_deadline(now + IDLE_TIME);
	if (nomem) {
		/* Only time brings memory back, so every session tries again
		 * after a pause.  A signal ends it: their pipe is first. */
		poll(fds, nfds > 0, NOMEM_PAUSE);
		nomem = 0;
		run_all = 1;
	}
	if (run_all || runnable != NULL)
		poll_until = 0;
	n = poll(fds, nfds, poll_until > now ? poll_until - now : 0);
	now = monotonic();
	if (n != 0)
		ready_at = now;
	else if (now - ready_at >= IDLE_TIME)
		spares_free();
	for (i = 0; n > 0 && i < nfds; i++) {
		r = fds[i].revents;
		if (r == 0 || handlers[i].ready == NULL)
			continue;
		/* The read or write that follows finds out what failed. */
		if (r & (POLLERR | POLLHUP | POLLNVAL))
			r |= fds[i].events;
		handlers[i].ready(handlers[i].arg, r);
	}
	nfds = 0;
	poll_until = now + POLL_TIME;
	return n;
}

void
session_wake(struct session *s)
{
	if (s->runnable)
		return;
	s->runnable = 1;
	s->next_runnable = NULL;
	*runnable_end = s;
	runnable_end = &s->next_runnable;
}

void
session_rest(struct session *s)
{
	struct session **p;

	if (!s->runnable)
		return;
	for (p = &runnable; *p != s; p = &(*p)->next_runnable)
		;
	*p = s->next_runnable;
	if (*p == NULL)
		runnable_end = p;
	s->runnable = 0;
}

/*
 * The spool.
 */

/* libclamav recognizes mail by its first header fields, and with some orders of
 * fields it does not find the attachments.  After this line it always does.
 * The line is never forwarded or quarantined. */
const char scan_line[] = "Received: by smtp.passthru\r\n";
const size_t scan_line_len = sizeof scan_line - 1;

static int
spool_named(const char *dir, char path[PATH_MAX])
{
	static const char name[] = "/clamsmtpd.XXXXXX";

	if (strlen(dir) + sizeof name > PATH_MAX) {
		errno = ENAMETOOLONG;
		return -1;
	}
	format(path, PATH_MAX, "%s%s", dir, name);
	return mkostemp(path, O_CLOEXEC);
}

/* Promise 7: a file without a name is removed when its descriptor is closed. */
int
spool_file(const char *dir, int keep)
{
	char path[PATH_MAX];
	int fd = -1;

#ifdef O_TMPFILE
	if (!keep)
		fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
#endif
	if (fd == -1) {
		fd = spool_named(dir, path);
		if (fd != -1 && !keep)
			unlink(path);
	}
	return fd;
}

static size_t in_memory;		/* bytes of all spools */

int
spool_open(struct spool *sp, const char *dir, int keep)
{
	*sp = (struct spool){ .dir = dir, .fd = -1 };
	if (keep || (sp->mem = mem_get()) == NULL)
		sp->fd = spool_file(dir, keep);
	return sp->mem == NULL && sp->fd == -1 ? -1 : 0;
}

static void
spool_free_mem(struct spool *sp)
{
	if (sp->mem == NULL)
		return;
	mem_put(sp->mem);
	sp->mem = NULL;
	in_memory -= sp->size;
}

void
spool_close(struct spool *sp)
{
	spool_free_mem(sp);
	if (sp->fd != -1)
		close(sp->fd);
	sp->fd = -1;
}

static int
spool_write_file(struct spool *sp, struct iovec *v, int nv)
{
	ssize_t n;

	while (nv > 0) {
		n = pwritev(sp->fd, v, nv, sp->size);
		if (n == -1 && errno == EINTR)
			continue;
		if (n == -1)
			return -1;
		sp->size += n;
		for (; nv > 0 && (size_t)n >= v->iov_len; v++, nv--)
			n -= v->iov_len;
		if (nv > 0) {
			v->iov_base = (char *)v->iov_base + n;
			v->iov_len -= n;
		}
	}
	return 0;
}

/* Move the message to a file.  Returns 0, or -1 with errno set. */
static int
spool_move(struct spool *sp)
{
	struct iovec v = { sp->mem, sp->size };
	struct spool file = { .dir = sp->dir, .fd = spool_file(sp->dir, 0) };

	if (file.fd == -1)
		return -1;
	if (spool_write_file(&file, &v, sp->size > 0) == -1) {
		close(file.fd);
		return -1;
	}
	spool_free_mem(sp);
	*sp = file;
	return 0;
}

int
spool_write(struct spool *sp, struct iovec *v, int n)
{
	size_t total = 0;
	int i;

	for (i = 0; i < n; i++)
		total += v[i].iov_len;
	if (sp->mem != NULL && (sp->size + total > MEMSPOOL ||
	    in_memory + total > MAXMEMORY) && spool_move(sp) == -1)
		return -1;
	if (sp->mem == NULL)
		return spool_write_file(sp, v, n);
	for (i = 0; i < n; i++) {
		memcpy(sp->mem + sp->size, v[i].iov_base, v[i].iov_len);
		sp->size += v[i].iov_len;
		in_memory += v[i].iov_len;
	}
	return 0;
}

ssize_t
spool_read(const struct spool *sp, void *to, size_t n, off_t at)
{
	if (sp->mem == NULL)
		return pread(sp->fd, to, n, at);
	if (at > sp->size)
		return 0;
	if ((off_t)n > sp->size - at)
		n = sp->size - at;
	memcpy(to, sp->mem + at, n);
	return n;
}

static int
copy_file(struct spool *from)
{
	off_t at = scan_line_len;
	ssize_t n;

	from->fd = FROM;
	while ((n = spool_read(from, shared, sizeof shared, at)) > 0) {
		if ((n = write(TO, shared, n)) == -1)
			return -1;
		at += n;
	}
	return n;
}

/* link(2) never overwrites another file.  On a file system without links (FAT,
 * some FUSE) O_EXCL reserves the name with an empty file, and rename(2)
 * replaces that. */
static int
copy_name(const struct quarantine *q)
{
	int fd;

	if (link(q->scratch, q->copy) == 0)
		return unlink(q->scratch);
	if (errno == EEXIST)
		return -1;
	fd = open(q->copy, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd == -1)
		return -1;
	close(fd);
	return rename(q->scratch, q->copy);
}

/* Write the directory to the disk, so that the name survives a crash.  Some
 * network file systems cannot do that and return EINVAL. */
static int
directory_sync(const char *path)
{
	int dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	return dir != -1 && (fsync(dir) == 0 || errno == EINVAL) ? 0 : -1;
}

/* Promise 5: runs in a child, since fsync() may take long. */
static void
quarantine_work(void *arg)
{
	struct quarantine *q = arg;
	const char *failed = NULL;

	if (copy_file(&q->from) == -1)
		failed = "copy";
	else if (fsync(TO) == -1)
		failed = "fsync";
	else if (copy_name(q) == -1)
		failed = "link or rename";
	else if (directory_sync(q->dir) == -1)
		failed = "fsync of the directory";
	if (failed != NULL)		/* the answer is the reason, then */
		format(q->copy, NOTESZ / 4, "%s: %s", failed, strerror(errno));
	(void)!write(ANSWER, q->copy, strlen(q->copy));
}

struct child *
spool_quarantine(const struct spool *sp, const char *dir,
    void (*done)(void *, const char *, size_t), void *ctx, int64_t ms)
{
	struct quarantine *q;
	struct child *c;
	int err, n = 0;

	for (c = children; c != NULL; c = c->next)
		n += c->files != NULL;
	if (n >= MAXCOPIES) {
		errno = EBUSY;
		return NULL;
	}
	if ((q = calloc(1, sizeof *q)) == NULL)
		return NULL;
	q->from = *sp;
	q->dir = dir;
	if ((q->to = spool_named(dir, q->scratch)) != -1) {
		format(q->copy, sizeof q->copy, "%s/virus.%s", dir,
		    strrchr(q->scratch, '.') + 1);
		c = child_start(quarantine_work, q, q, done, ctx, ms);
	}
	err = errno;
	if (c == NULL && q->to != -1)
		unlink(q->scratch);
	close(q->to);
	if (c == NULL)
		free(q);
	errno = err;
	return c;
}
