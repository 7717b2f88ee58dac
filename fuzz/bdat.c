/*
 * Target bdat: the dialogue of dialogue.h.  In its corpus most bytes are in
 * chunks.
 */

#include "../smtp.c"
#include "fuzz.h"
#include "bodyref.h"
#include "dialogue.h"

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	dialogue(data, size);
	return 0;
}

#include "fuzz.h"
