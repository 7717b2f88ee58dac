/*
 * Proof of clamd_parse(): every sequence of words up to a length is compared
 * with regular expressions.
 */

#include <regex.h>

#include "../clamd.c"
#include "../fuzz/fuzz.h"
#include "prove.h"

#define WORD(s)	{ s, sizeof s - 1 }

static const struct {
	const char *p;
	size_t	 n;
} words[] = {
	WORD("stream: "), WORD("stream:"), WORD("OK"), WORD(" OK"),
	WORD(" FOUND"), WORD("FOUND"), WORD(" "), WORD("\n"), WORD("\0"),
	WORD("\r"), WORD("Eicar-Test"), WORD("\x80\xff"), WORD("O"),
	WORD("ERROR"), WORD("INSTREAM size limit exceeded"),
	WORD("INSTREAM size limit "),
};
#define NWORDS	(sizeof words / sizeof words[0])

static regex_t clean, virus, too_big, two_lines;
static unsigned long long runs;

static void
compile(regex_t *r, const char *pattern)
{
	CHECK(regcomp(r, pattern, REG_EXTENDED) == 0, "%s", pattern);
}

/* The definition.  Returns the verdict, and sets the place of the name. */
static enum verdict
define(const char *p, size_t n, size_t *name, size_t *len)
{
	char text[512];
	regmatch_t m[2];
	size_t i;

	/* regexec(3) ends at a NUL, and may take 8-bit bytes for UTF-8. */
	for (i = 0; i < n; i++)
		text[i] = p[i] == '\0' || (p[i] & 0x80) ? '\1' : p[i];
	text[n] = '\0';
	if (regexec(&two_lines, text, 0, NULL, 0) == 0)
		return FAILED;
	if (regexec(&too_big, text, 0, NULL, 0) == 0)
		return TOOBIG;
	if (regexec(&clean, text, 0, NULL, 0) == 0)
		return CLEAN;
	if (regexec(&virus, text, 2, m, 0) != 0)
		return FAILED;
	*name = m[1].rm_so;
	*len = m[1].rm_eo - m[1].rm_so;
	return VIRUS;
}

static void
check(const char *p, size_t n)
{
	char got[NAMESZ];
	enum verdict v, want;
	size_t name = 0, len = 0, i;

	v = clamd_parse(p, n, got);
	want = define(p, n, &name, &len);
	CHECK(v == want, "%s: verdict %d, not %d", show(p, n), v, want);
	runs++;
	if (v != VIRUS)
		return;
	if (len > NAMESZ - 1)
		len = NAMESZ - 1;
	CHECK(strlen(got) == len, "%s: the name is %s", show(p, n), got);
	for (i = 0; i < len; i++)
		CHECK(got[i] == (p[name + i] > 32 && p[name + i] < 127 ?
		    p[name + i] : '_'), "%s: the name is %s", show(p, n), got);
}

static void
all(char *text, size_t n, size_t left)
{
	size_t i;

	check(text, n);
	for (i = 0; i < NWORDS && left > 0; i++) {
		memcpy(text + n, words[i].p, words[i].n);
		all(text, n + words[i].n, left - 1);
	}
}

int
main(int argc, char **argv)
{
	char text[512];
	size_t i, n, words_max = depth(argc, argv, 5);

	compile(&two_lines, "\n");
	compile(&too_big, "INSTREAM size limit exceeded");
	compile(&clean, "^stream: OK$");
	compile(&virus, "^stream: (.+) FOUND$");
	all(text, 0, words_max);

	/* Names of each length, and each byte in a name. */
	for (n = 0; n < 2 * NAMESZ; n++) {
		memcpy(text, "stream: ", 8);
		memset(text + 8, 'v', n);
		memcpy(text + 8 + n, " FOUND", 6);
		check(text, 14 + n);
		for (i = 0; i < 256 && n > 0; i++) {
			text[8 + n / 2] = i;
			check(text, 14 + n);
		}
	}
	printf("clamd: %llu answers\n", runs);
	return 0;
}

#include "../fuzz/fuzz.h"
