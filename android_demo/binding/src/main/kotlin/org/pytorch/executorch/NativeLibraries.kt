package org.pytorch.executorch

import com.facebook.soloader.nativeloader.NativeLoader
import com.facebook.soloader.nativeloader.NativeLoaderDelegate

/**
 * Loads the native libraries, once.
 *
 * `executorch` comes first: then fbjni is linked against the C++ runtime inside of it. The other way round, the first native error ends the
 * process instead of becoming an exception.
 */
object NativeLibraries {
    private val names = listOf("executorch", "fbjni")
    private var loaded = false

    /** [load] is called with each library's name; on a phone that is `System.loadLibrary`. */
    @Synchronized
    fun load(load: (String) -> Unit = System::loadLibrary) {
        if (loaded) return
        if (!NativeLoader.isInitialized()) NativeLoader.init(AlreadyLoaded)
        names.forEach(load)
        loaded = true
    }

    /** fbjni's Java classes ask for their library, which [load] has loaded. */
    private object AlreadyLoaded : NativeLoaderDelegate {
        override fun loadLibrary(name: String, flags: Int) = true

        override fun getLibraryPath(name: String): String? = null

        override fun getSoSourcesVersion() = 0
    }
}
