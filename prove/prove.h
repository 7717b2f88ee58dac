/*
 * Functions that the proofs share: the start, and printing a string.
 */

/* Initialise, and return the number in the first argument, or standard. */
static size_t
depth(int argc, char **argv, size_t standard)
{
	LLVMFuzzerInitialize(&argc, &argv);
	log_level = LOG_ERR;		/* do not log each of millions of runs */
	return argc > 1 ? strtoul(argv[1], NULL, 10) : standard;
}

/* Returns the string in printable form, in one of four static buffers. */
static __attribute__((unused)) const char *
show(const void *string, size_t n)
{
	static char ring[4][1024];
	static int turn;
	const unsigned char *p = string;
	char *to = ring[turn++ & 3];
	size_t i, k = 0;

	to[k++] = '"';
	for (i = 0; i < n && k < sizeof ring[0] - 8; i++)
		if (p[i] > ' ' && p[i] < 127 && p[i] != '\\')
			to[k++] = p[i];
		else
			k += sprintf(to + k, "\\x%02X", p[i]);
	strcpy(to + k, "\"");
	return to;
}
