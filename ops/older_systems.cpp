/*
 * What headers take from the libraries of a newer system than the shim is to load on. Without
 * these lines it would need glibc 2.32 and the libstdc++ of GCC 9; with them, the glibc 2.27
 * and the GCC 8 of manylinux_2_28, whatever compiles it. tests/test_symbols.py checks.
 */
#include <sstream>

#ifdef __GLIBCXX__

/* Whether shared_ptr (which holds torch's tensors) may count without atomic instructions:
 * never. In the place of glibc's variable of that name, within this library. */
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

/* Inline, but declared extern: where the compiler does not inline, it calls libstdc++'s. */
#if _GLIBCXX_RELEASE >= 9
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
#endif

#endif
