/* libm.so, libdl.so and libandroid.so: the libraries ask for them by name and version; libc.so has all of their symbols. */
int shim_empty_marker;
