package dev.lobit.host

import org.pytorch.executorch.NativeLibraries

/** Loads the phone's libraries on Linux, from a folder that also has those that stand for Android's own. */
object Libraries {
    /** Opens a library so that it finds its symbols beside it first; returns null or what is wrong. */
    @JvmStatic private external fun open(path: String): String?

    fun load(folder: String) {
        System.load("$folder/libopen.so")
        NativeLibraries.load { name ->
            val path = "$folder/lib$name.so"
            open(path)?.let { throw UnsatisfiedLinkError(it) }
            System.load(path)
        }
    }
}
