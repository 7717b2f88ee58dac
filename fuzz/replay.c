/*
 * The main() of a target without libFuzzer.  It runs each file named on the
 * command line once.
 */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *, size_t);
int LLVMFuzzerInitialize(int *, char ***);

#define MAX	(1 << 16)

int
main(int argc, char **argv)
{
	uint8_t *p, *exact;
	size_t n, i;
	FILE *f;
	int k;

	LLVMFuzzerInitialize(&argc, &argv);
	if ((p = malloc(MAX)) == NULL)
		return 1;
	for (k = 1; k < argc; k++) {
		if ((f = fopen(argv[k], "rb")) == NULL) {
			perror(argv[k]);
			return 1;
		}
		n = fread(p, 1, MAX, f);
		fclose(f);
		/* Memory of the exact size shows a read past its end. */
		if ((exact = malloc(n > 0 ? n : 1)) == NULL)
			return 1;
		for (i = 0; i < n; i++)
			exact[i] = p[i];
		fprintf(stderr, "%s\n", argv[k]);	/* the last one failed */
		LLVMFuzzerTestOneInput(exact, n);
		free(exact);
	}
	free(p);
	printf("%d inputs\n", argc - 1);
	return 0;
}
