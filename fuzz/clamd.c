/*
 * Target clamd: the answers of clamd.  Byte 0 of the input: 1 single bytes, 2
 * clamd answers before it has the whole message, 4 the bytes go to
 * clamd_parse() at once.  The rest is what clamd sends until it closes the
 * connection.
 */

#include "../clamd.c"
#include "fuzz.h"

static int
ref_has(const char *p, size_t n, const char *word)
{
	size_t i, len = strlen(word);

	for (i = 0; i + len <= n; i++)
		if (memcmp(p + i, word, len) == 0)
			return 1;
	return 0;
}

/*
 * The definition: an answer is one line, exactly `stream: OK' or `stream: NAME
 * FOUND'.  Everything else is a failure, except that the error for clamd's size
 * limit has a verdict of its own.
 */
static enum verdict
ref_parse(const char *p, size_t n, char name[NAMESZ])
{
	char line[STREAMMAX], *text, *end;
	size_t i;

	name[0] = '\0';
	for (i = 0; i < n; i++)
		if (p[i] == '\n')
			return FAILED;
	if (ref_has(p, n, "INSTREAM size limit exceeded"))
		return TOOBIG;
	memcpy(line, p, n);
	line[n] = '\0';
	if (strncmp(line, "stream: ", 8) != 0)
		return FAILED;
	text = line + 8;
	if (line + n - text == 2 && strcmp(text, "OK") == 0)
		return CLEAN;
	end = line + n - 6;
	if (end <= text || memcmp(end, " FOUND", 6) != 0)
		return FAILED;
	for (i = 0; text < end && i < NAMESZ - 1; i++, text++)
		name[i] = *text > 32 && *text < 127 ? *text : '_';
	name[i] = '\0';
	return VIRUS;
}

static void
check_parse(const char *p, size_t n)
{
	char *copy = malloc(n + 1), name[NAMESZ] = "", want_name[NAMESZ];
	enum verdict v, want;

	CHECK(copy != NULL, "memory");
	memcpy(copy + 1, p, n);		/* ends at the end of its memory */
	v = clamd_parse(copy + 1, n, name);
	want = ref_parse(p, n, want_name);
	CHECK(v == want, "verdict %d, reference %d", v, want);
	if (v == VIRUS)
		same("name", name, strlen(name), want_name, strlen(want_name));
	free(copy);
}

/* Compare the verdict that a session derives from the answer. */
static void
check_session(struct session *s, const struct stream *in, int early)
{
	struct clamd *c = s->conf->clamd[0];
	char name[NAMESZ];
	enum verdict want;
	size_t i, sent = 0, n, k;
	int too_long = 0, done = 0;

	s->scan.scanning = !early;
	s->scan.phase = SC_ANSWER;
	slot_take(s, c);
	for (i = 0; i <= in->ncut && !done; i++) {
		if (i == in->ncut)
			s->scan.peer.eof = 1;
		else if (!feed(&s->scan.peer.in, in->p + sent, in->cut[i] - sent))
			break;
		else
			sent = in->cut[i];
		too_long |= sent > ANSWERSZ && memchr(in->p, '\0', sent) == NULL;
		while (!done && s->scan.phase == SC_ANSWER) {
			done = scan_read(s);
			if (!done)
				break;
		}
	}
	CHECK(done, "the session waits without end");
	for (n = 0; n < sent && in->p[n] != '\0'; n++)
		;
	k = n < sent ? n : n > 0 && in->p[n - 1] == '\n' ? n - 1 : n;
	want = n == 0 && sent == 0 ? FAILED : ref_parse(in->p, k, name);
	/* The answer must end with its NUL. */
	if (too_long || (n + 1 != sent && want != TOOBIG) || want == FAILED)
		want = FAILED;
	if (early && want == CLEAN)
		want = FAILED;
	if (sent > ANSWERSZ && s->result.verdict == FAILED)
		want = FAILED;		/* may be refused for its length */
	CHECK(s->result.verdict == want, "verdict %d, reference %d", s->result.verdict, want);
	if (want == VIRUS)
		same("name", s->result.text, strlen(s->result.text), name, strlen(name));
	CHECK(strlen(s->result.text) < NAMESZ, "the reason is too long");
	clamd_cancel(s);
	CHECK(c->running == 0, "the slot is not released");
	c->complaint[0] = '\0';
	c->dead_until = 0;
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct conf conf;
	static char text[] = "clamd";
	static struct target target = { .refs = 1, .text = text };
	static struct stream in;
	struct session *s;

	if (size < 1)
		return 0;
	stream_read(&in, data + 1, size - 1, data[0] & 1);
	if (data[0] & 4) {
		check_parse(in.p, in.n);
		return 0;
	}
	if (conf.nclamd == 0)
		conf.clamd[conf.nclamd++] = clamd_get(&target);
	s = new_session(&conf);
	s->scan.peer.fd = dup(null_fd);
	check_session(s, &in, (data[0] & 2) != 0);
	clamd_cancel(s);
	session_rest(s);
	peer_close(&s->client);
	peer_close(&s->server.peer);
	peer_close(&s->scan.peer);
	free(s);
	return 0;
}

#include "fuzz.h"
