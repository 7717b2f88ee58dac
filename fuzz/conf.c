/*
 * Target conf: reading a configuration file.  Each accepted setting must be
 * within the bounds that the manual page names.  The output of -n, read again,
 * must give the same settings.  Byte 0 of the input: 1 with an older flag, 2
 * with -p.  The rest is the file.
 */

#include "../conf.c"
#include "fuzz.h"

#include <sys/mman.h>

static int file = -1, shown = -1;

static void
file_put(const void *p, size_t n)
{
	if (file == -1)
		file = memfd_create("conf", 0);
	CHECK(file != -1 && ftruncate(file, 0) == 0 &&
	    pwrite(file, p, n, 0) == (ssize_t)n, "cannot write the file");
}

/* Append what conf_show() prints on standard output to `to'. */
static void
show(const struct conf *c, struct text *to)
{
	static char piece[65536];
	int out = dup(1);
	ssize_t n;

	if (shown == -1)
		shown = memfd_create("shown", 0);
	CHECK(out != -1 && shown != -1 && ftruncate(shown, 0) == 0, "memfd");
	CHECK(lseek(shown, 0, SEEK_SET) == 0 && dup2(shown, 1) == 1, "dup2");
	conf_show(c);
	dup2(out, 1);
	close(out);
	lseek(shown, 0, SEEK_SET);
	while ((n = read(shown, piece, sizeof piece)) > 0)
		text_add(to, piece, n);
}

static void
check_target(const struct target *t, int lowest)
{
	CHECK(t->text != NULL && t->naddr >= 0 && t->naddr <= 1, "target");
	if (t->naddr == 1 && t->addr[0].u.sa.sa_family == AF_UNIX)
		return;
	CHECK((int)t->port >= lowest && t->port <= 65535, "port %u", t->port);
	CHECK(t->naddr == 0 || addr_port(&t->addr[0]) == t->port,
	    "the address and the target differ in the port");
}

static void
check_header(const char *p)
{
	size_t i;

	CHECK(*p != '\0', "an empty header must be NULL");
	for (i = 0; p[i] != '\0'; i++)
		if (p[i] == '\r')
			CHECK(p[i + 1] == '\n', "a bare CR");
		else if (p[i] == '\n') {
			CHECK(i > 0 && p[i - 1] == '\r', "a bare LF");
			CHECK(p[i + 1 + strspn(p + i + 1, " \t\r")] != '\n' &&
			    p[i + 1 + strspn(p + i + 1, " \t\r")] != '\0',
			    "an empty line would end the header section");
		} else
			CHECK(((unsigned char)p[i] >= ' ' || p[i] == '\t') &&
			    p[i] != 127, "a control character");
}

static void
check(const struct conf *c)
{
	int usual = c->seen[find_keyword("ClamAddress") - keywords] ==
	    BY_DEFAULT;
	int i;

	CHECK(c->maxconn >= 2 && c->maxconn <= 65535, "%d", (int)c->maxconn);
	CHECK(c->maxscans >= 1 && c->maxscans <= 1000, "%d", (int)c->maxscans);
	CHECK(c->maxscansize >= 0, "MaxScanSize");
	CHECK(c->timeout >= SECOND && c->timeout <= 86400 * SECOND, "TimeOut");
	CHECK(c->scantimeout >= SECOND && c->scantimeout <= 86400 * SECOND,
	    "ScanTimeOut");
	CHECK(c->keepalives >= 0 && c->keepalives <= 86400 * SECOND,
	    "KeepAlives");
	CHECK(c->action == DROP || c->action == BOUNCE || c->action == PASS,
	    "Action");
	CHECK(c->nlisten >= 1 && c->nlisten <= MAXLISTEN, "Listen");
	CHECK(c->nclamd >= 1 && c->nclamd <= MAXCLAMDS, "ClamAddress");
	CHECK(c->out != NULL || c->transparent, "OutAddress");
	CHECK(c->tempdir != NULL && *c->tempdir == '/', "TempDirectory");
	CHECK(c->pidfile == NULL || *c->pidfile == '/', "PidFile");
	if (c->out != NULL)
		check_target(c->out, 1);
	for (i = 0; i < c->nlisten; i++) {
		check_target(c->listen[i], 0);
		CHECK(c->listen[i]->naddr == 1 || c->listen[i]->name != NULL,
		    "Listen has no address");
	}
	CHECK(!usual || (c->nclamd == 1 &&
	    c->clamd[0]->target->naddr == 3), "the default ClamAddress");
	for (i = 0; i < c->nclamd && !usual; i++)
		check_target(c->clamd[i]->target, 1);
	for (i = 1; i < c->nclamd; i++)
		CHECK(c->clamd[i] != c->clamd[i - 1],
		    "one clamd is in the list twice");
	if (c->header != NULL)
		check_header(c->header);
	(void)conf_action(c, "Eicar-Test-Signature");
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const char *const flags[][2] = { { "Listen", "127.0.0.1:0" },
	    { "OutAddress", "10026" } };
	struct text one = { NULL, 0, 0 }, two = { NULL, 0, 0 };
	struct conf *c, *again;
	char path[64];

	if (size < 1)
		return 0;
	file_put(data + 1, size - 1);
	snprintf(path, sizeof path, "/proc/self/fd/%d", file);
	c = conf_load(path, flags, data[0] & 1 ? 2 : 0,
	    data[0] & 2 ? "/run/x.pid" : NULL);
	if (c == NULL)
		return 0;
	check(c);
	show(c, &one);
	file_put(one.p, one.n);
	again = conf_load(path, NULL, 0, NULL);
	CHECK(again != NULL, "the output of -n is refused:\n%s", one.p);
	check(again);
	show(again, &two);
	same("shown", one.p, one.n, two.p, two.n);
	CHECK(c->action == again->action && c->timeout == again->timeout &&
	    c->scantimeout == again->scantimeout &&
	    c->nlisten == again->nlisten && c->nclamd == again->nclamd &&
	    c->maxscansize == again->maxscansize,
	    "the output of -n gives other settings");
	CHECK((c->header == NULL) == (again->header == NULL) &&
	    (c->header == NULL || strcmp(c->header, again->header) == 0),
	    "the output of -n gives another header");
	conf_put(again);
	conf_put(c);
	text_free(&one);
	text_free(&two);
	return 0;
}

#include "fuzz.h"
