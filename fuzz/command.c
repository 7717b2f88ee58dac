/*
 * Target command: the dialogue of dialogue.h, with any command lines.  With 32
 * in byte 0 the rest of the input is xtext (RFC 3461), with 64 it is a text
 * that is encoded as xtext and decoded again.
 */

#include "../smtp.c"
#include "fuzz.h"
#include "bodyref.h"
#include "dialogue.h"

static int
hex(char c)
{
	const char *digits = "0123456789ABCDEFabcdef", *p;

	p = c == '\0' ? NULL : strchr(digits, c);
	return p == NULL ? -1 : p - digits < 16 ? p - digits : p - digits - 6;
}

/* Compare the decoded xtext.  The daemon keeps up to 255 bytes, and nothing of
 * a text that begins with a bracket. */
static void
check_decode(const char *p, size_t n)
{
	struct str got = { NULL, 0, 0 };
	struct text want = { NULL, 0, 0 };
	char *copy = malloc(n + 1), c;
	size_t i = 0;

	CHECK(copy != NULL, "memory");
	memcpy(copy + 1, p, n);
	CHECK(xtext_decode(&got, copy + 1, n) == 0, "memory");
	text_add(&want, "", 0);
	if (n > 5 && strncasecmp(p, "IPV6:", 5) == 0)
		i = 5;
	if (i < n && p[i] == '[')
		i = n;
	while (i < n && want.n < 255) {
		c = p[i++];
		if (c == '+' && i + 1 < n && hex(p[i]) >= 0 &&
		    hex(p[i + 1]) >= 0) {
			c = hex(p[i]) * 16 + hex(p[i + 1]);
			i += 2;
		}
		text_add(&want, &c, 1);
	}
	same("xtext", got.s, got.len, want.p, want.n);
	str_free(&got);
	text_free(&want);
	free(copy);
}

/* Encode the text, decode it again, and compare. */
static void
check_round(const char *p, size_t n)
{
	struct str got = { NULL, 0, 0 };
	struct text coded = { NULL, 0, 0 };
	char piece[8];
	size_t i;

	text_add(&coded, "", 0);
	if (n > 255)
		n = 255;
	for (i = 0; i < n; i++)
		if (p[i] > 32 && p[i] < 127 && p[i] != '+' && p[i] != '=' &&
		    p[i] != '[' && p[i] != ':')
			text_add(&coded, p + i, 1);
		else {
			snprintf(piece, sizeof piece, "+%02X",
			    (unsigned char)p[i]);
			text_puts(&coded, piece);
		}
	CHECK(xtext_decode(&got, coded.p, coded.n) == 0, "memory");
	same("xtext encoded and decoded", got.s, got.len, p, n);
	str_free(&got);
	text_free(&coded);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size > 0 && (data[0] & 64))
		check_round((const char *)data + 1, size - 1);
	else if (size > 0 && (data[0] & 32))
		check_decode((const char *)data + 1, size - 1);
	else
		dialogue(data, size);
	return 0;
}

#include "fuzz.h"
