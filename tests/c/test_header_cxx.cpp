/* The header as C++17, and its functions called from there. */
#include "test_header.c"
