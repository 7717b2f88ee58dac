/*
 * Proofs of the text functions.  text_char() is tried with every sequence of
 * three bytes and with four-byte ones, printable() and json_string() with every
 * short string and with strings that end near the limits of their buffers.
 */

#include "../util.c"
#include "../fuzz/fuzz.h"
#include "prove.h"

static unsigned long long runs;

/*
 * The definition of UTF-8 is a list of all its characters, made from the table
 * in RFC 3629.  A bit is set for each sequence of n bytes that is a character.
 */
static unsigned char one[1 << 5], two[1 << 13], three[1 << 21];
static unsigned char four[1 << 24];	/* F0 to F4 only: 3 bits and 24 */

static size_t
encode(unsigned long c, unsigned char u[4])
{
	if (c < 0x80) {
		u[0] = c;
		return 1;
	}
	if (c < 0x800) {
		u[0] = 0xc0 + c / 64;
		u[1] = 0x80 + c % 64;
		return 2;
	}
	if (c < 0x10000) {
		u[0] = 0xe0 + c / 4096;
		u[1] = 0x80 + c / 64 % 64;
		u[2] = 0x80 + c % 64;
		return 3;
	}
	u[0] = 0xf0 + c / 262144;
	u[1] = 0x80 + c / 4096 % 64;
	u[2] = 0x80 + c / 64 % 64;
	u[3] = 0x80 + c % 64;
	return 4;
}

static unsigned long
number(const unsigned char *u, size_t n)
{
	unsigned long v = 0;
	size_t i;

	for (i = 0; i < n; i++)
		v = v << 8 | u[i];
	return v;
}

#define BIT(map, i)	((map)[(i) >> 3] >> ((i) & 7) & 1)

static void
define(void)
{
	unsigned char u[4], *map[] = { one, two, three, four };
	unsigned long c, i;
	size_t n;

	for (c = 0; c < 0x110000; c++) {
		if (c >= 0xd800 && c < 0xe000)
			continue;		/* a surrogate */
		n = encode(c, u);
		i = number(u, n);
		if (n == 4)
			i -= 0xf0000000;
		map[n - 1][i >> 3] |= 1 << (i & 7);
	}
}

/* Returns the length of the character at u, or 0 for none. */
static size_t
defined(const unsigned char *u, size_t n)
{
	if (n >= 1 && BIT(one, u[0]))
		return 1;
	if (n >= 2 && BIT(two, number(u, 2)))
		return 2;
	if (n >= 3 && BIT(three, number(u, 3)))
		return 3;
	if (n >= 4 && u[0] >= 0xf0 && u[0] < 0xf8 &&
	    BIT(four, number(u, 4) - 0xf0000000))
		return 4;
	return 0;
}

/* Returns the length of the character at u if it is text, which is all except
 * C0, DEL and C1, or 0. */
static size_t
defined_text(const unsigned char *u, size_t n)
{
	size_t len = defined(u, n);

	if (len == 1 && (u[0] < 32 || u[0] == 127))
		return 0;
	if (len == 2 && u[0] == 0xc2 && u[1] < 0xa0)
		return 0;
	return len;
}

static void
check_char(const unsigned char *u, size_t n)
{
	size_t got = text_char((const char *)u, n);

	CHECK(got == defined_text(u, n), "%s: %zu bytes of text, not %zu",
	    show(u, n), got, defined_text(u, n));
	runs++;
}

static void
check_chars(int full)
{
	static const unsigned char edge[] = {
		0, 10, 31, 32, 126, 127, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0,
		0xc1, 0xc2, 0xdf, 0xe0, 0xe1, 0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1,
		0xf3, 0xf4, 0xf5, 0xf7, 0xf8, 0xfb, 0xfc, 0xfe, 0xff
	};
	unsigned char u[4] = { 0 };
	unsigned long c, v;
	size_t a, b, n, m;

	for (v = 0; v < 1 << 24; v++) {
		u[0] = v >> 16;
		u[1] = v >> 8;
		u[2] = v;
		check_char(u, 3);
		if ((v & 0xff) == 0)
			check_char(u, 2);
		if ((v & 0xffff) == 0)
			check_char(u, 1);
	}
	for (c = 0x10000; c < 0x110000; c++)
		check_char(u, encode(c, u));
	for (a = 0; a < sizeof edge; a++)
		for (b = 0; b < sizeof edge; b++)
			for (n = 0; n < sizeof edge; n++)
				for (m = 0; m < sizeof edge; m++) {
					u[0] = edge[a];
					u[1] = edge[b];
					u[2] = edge[n];
					u[3] = edge[m];
					check_char(u, 4);
				}
	for (v = 0; full && v < UINT32_MAX; v++) {
		u[0] = v >> 24;
		u[1] = v >> 16;
		u[2] = v >> 8;
		u[3] = v;
		check_char(u, 4);
	}
}

/* Write the string to `to', with fmt for what is not text, and with backslashes
 * before the characters of quoted.  A byte below lowest is not text either.
 * Set ends to where each character ends.  Returns the number of ends. */
static size_t
written(char *to, size_t *ends, const unsigned char *p, size_t n, int lowest,
    const char *fmt, const char *quoted)
{
	size_t len, k = 0, count_ = 0;

	for (ends[count_++] = 0; n > 0; p += len, n -= len) {
		len = defined_text(p, n);
		if (len == 0 || (len == 1 && *p < lowest)) {
			/* JSON has a C1 control by number, its 2nd byte. */
			len = *quoted != '\0' && defined(p, n) == 2 ? 2 : 1;
			k += sprintf(to + k, fmt, p[len - 1]);
		} else {
			if (len == 1 && strchr(quoted, *p) != NULL)
				to[k++] = '\\';
			memcpy(to + k, p, len);
			k += len;
		}
		ends[count_++] = k;
	}
	return count_;
}

/*
 * Check that got is all of p, written, or, if that has more than limit bytes,
 * its first characters and "...".
 */
static void
check_cut(const char *got, size_t n, const unsigned char *p, size_t plen,
    int lowest, const char *fmt, const char *quoted, size_t limit)
{
	static char want[16384];
	static size_t ends[2048];
	size_t i, c = written(want, ends, p, plen, lowest, fmt, quoted);

	runs++;
	if (n == ends[c - 1] && memcmp(got, want, n) == 0)
		return;
	CHECK(ends[c - 1] > limit, "%s: cut to %s, although there is room",
	    show(p, plen), show(got, n));
	CHECK(n >= 3 && memcmp(got + n - 3, "...", 3) == 0 &&
	    memcmp(got, want, n - 3) == 0, "%s: %s", show(p, plen),
	    show(got, n));
	for (i = 0; i < c && ends[i] != n - 3; i++)
		;
	CHECK(i < c, "%s is cut inside a character: %s", show(p, plen),
	    show(got, n));
}

static void
check_printable(const unsigned char *p, size_t n)
{
	const char *got = printable((const char *)p, n);

	CHECK(strlen(got) < LOGSZ, "too long for its buffer");
	check_cut(got, strlen(got), p, n, ' ', "\\x%02X", "", LOGSZ - 8);
	got = printable_word((const char *)p, n);
	CHECK(strlen(got) < LOGSZ, "too long for its buffer");
	check_cut(got, strlen(got), p, n, ' ' + 1, "\\x%02X", "", LOGSZ - 8);
}

/* Check a JSON string with room for this many bytes, the quotes included. */
static void
check_json(const unsigned char *p, size_t n, size_t room)
{
	const size_t start = 100;

	json_n = start;
	json[start + room] = '#';
	json_string((const char *)p, n, start + room);
	CHECK(json_n <= start + room && json[start + room] == '#',
	    "%s: longer than its field", show(p, n));
	CHECK(json_n >= start + 2 && json[start] == '"' &&
	    json[json_n - 1] == '"', "%s: not a JSON string", show(p, n));
	check_cut(json + start + 1, json_n - start - 2, p, n, 0, "\\u%04x",
	    "\"\\", room - 13);
}

static void
check_strings(size_t longest)
{
	static const struct {
		const char *p;
		size_t	 n;
	} words[] = {
		{ "x", 1 }, { " ", 1 }, { "\n", 1 }, { "\0", 1 }, { "\"", 1 },
		{ "\\", 1 }, { "\xc3\xa9", 2 }, { "\xc2\x85", 2 },
		{ "\xe2\x82\xac", 3 }, { "\xf0\x9f\x98\x80", 4 }, { "\xff", 1 },
		{ "\xe2\x82", 2 },
	};
	const size_t nwords = sizeof words / sizeof words[0];
	unsigned char p[2 * LOGSZ];
	size_t i, k, n, length, total, start;

	for (i = 0; i < 65536; i++) {
		p[0] = i >> 8;
		p[1] = i;
		for (n = 1; n <= 2; n++) {
			check_printable(p, n);
			check_json(p, n, JSONFIELD);
		}
	}
	/* Try all words after text that nearly fills the buffer. */
	for (length = 0, total = 1; length <= longest; length++, total *= nwords)
		for (i = 0; i < total; i++)
			for (start = 0; start < 28; start += start == 0 ? 5 : 1) {
				n = start == 0 ? 0 : LOGSZ - start;
				memset(p, 'x', n);
				for (k = i; k > 0 || n < length; k /= nwords) {
					memcpy(p + n, words[k % nwords].p,
					    words[k % nwords].n);
					n += words[k % nwords].n;
				}
				check_printable(p, n);
				if (start == 0)
					check_json(p, n, JSONFIELD);
				else if (n > LOGSZ - JSONFIELD)
					check_json(p + LOGSZ - JSONFIELD,
					    n - (LOGSZ - JSONFIELD), JSONFIELD);
			}
}

int
main(int argc, char **argv)
{
	size_t longest = depth(argc, argv, 3);

	define();
	check_chars(longest > 4);
	printf("utf8: %llu sequences\n", runs);
	runs = 0;
	check_strings(longest);
	printf("text: %llu strings\n", runs);
	return 0;
}

#include "../fuzz/fuzz.h"
