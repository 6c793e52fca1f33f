package dev.lobit.core

import java.io.File
import java.io.FilterInputStream
import java.io.IOException
import java.io.InputStream
import java.io.OutputStream
import java.util.zip.ZipException
import java.util.zip.ZipInputStream

/** Unpacks a zip of a bundle, as [Bundle.unzip] says. Nothing is written that the manifest does not bound. */
internal class BundleZip(private val into: File, private val supported: Supported, private val progress: Progress) {
    private val partial = File(into.absoluteFile.parentFile, "${into.name}.partial")

    /** Paths in the zip, lower-case: some phones' storage does not tell cases apart. */
    private val seen = HashSet<String>()
    private val written = LinkedHashMap<String, Long>()
    private var manifest: Manifest? = null

    /** What stands before `manifest.json` in the zip: nothing, or a folder's name and a slash. */
    private var top = ""
    private var done = 0L

    fun unpack(stream: InputStream): Bundle {
        if (into.exists()) throw refusal(Reason.ARCHIVE, "${into.name} is already there: delete it first")
        partial.deleteRecursively()
        try {
            partial.mkdirs()
            val counted = Counted(stream)
            ZipInputStream(counted.buffered()).use { zip -> entries(zip, counted) }
            return finished()
        } catch (error: ZipException) {
            throw refusal(Reason.ARCHIVE, "the zip file is damaged (${error.message}): copy it again")
        } catch (error: IllegalArgumentException) { // names that are not in the encoding that the zip tells
            throw refusal(Reason.ARCHIVE, "the zip file is damaged (${error.message}): copy it again")
        } catch (error: IOException) {
            throw refusal(Reason.ARCHIVE, "the zip file cannot be unpacked (${error.message}): copy it again, or make space")
        } finally {
            partial.deleteRecursively()
        }
    }

    private fun entries(zip: ZipInputStream, source: Counted) {
        while (true) {
            val entry = zip.nextEntry ?: break
            if (entry.isDirectory) continue
            ManifestReader.checkPath(entry.name)
            if (!seen.add(entry.name.lowercase())) refuse("the zip file has ${shown(entry.name)} twice: do not use it")
            if (seen.size > MOST_ENTRIES) refuse("the zip file has more than $MOST_ENTRIES files: zip the bundle alone")
            val known = manifest
            when {
                known == null && isManifest(entry.name) -> readManifest(zip, entry.name)
                known == null -> write(zip, entry.name) { done -> done <= LEAST + source.read * LARGEST_RATIO }
                else -> known.files.find { top + it.path == entry.name }?.let { told ->
                    val most = this.done + told.bytes
                    write(zip, entry.name) { it <= most }
                }
            }
        }
    }

    private fun refuse(message: String): Nothing = throw refusal(Reason.ARCHIVE, message)

    private fun isManifest(path: String) = path.substringAfterLast('/') == Manifest.FILE_NAME && path.count { it == '/' } <= 1

    private fun readManifest(zip: ZipInputStream, path: String) {
        val bytes = java.io.ByteArrayOutputStream()
        copy(zip, bytes) { it <= Manifest.LARGEST }
        val read = Manifest.read(bytes.toByteArray())
        Bundle.checkRuns(read, supported)
        manifest = read
        top = path.removeSuffix(Manifest.FILE_NAME)
        File(partial, path).apply { parentFile?.mkdirs() }.writeBytes(bytes.toByteArray())
        written[path] = bytes.size().toLong()
    }

    /** Writes an entry; [allowed] says whether so many bytes may be there in all after it. */
    private fun write(zip: ZipInputStream, path: String, allowed: (Long) -> Boolean) {
        val file = File(partial, path).apply { parentFile?.mkdirs() }
        val before = done
        val total = manifest?.files?.sumOf { it.bytes } ?: 0
        val size = file.outputStream().use { out ->
            copy(zip, out) { size ->
                progress(before + size, total)
                allowed(before + size)
            }
        }
        done = before + size
        written[path] = size
    }

    private fun copy(from: InputStream, to: OutputStream, allowed: (Long) -> Boolean): Long = from.forEachPiece { buffer, size, done ->
        if (!allowed(done)) refuse("the zip file unpacks to more than its bundle's files have: do not use it")
        to.write(buffer, 0, size)
    }

    private fun finished(): Bundle {
        val read = manifest ?: refuse("the file is no zip of a bundle, it has no manifest.json: zip a folder of `lobit export`")
        val wanted = read.files.map { top + it.path } + (top + Manifest.FILE_NAME)
        (written.keys - wanted.toSet()).forEach { File(partial, it).delete() }
        val folder = File(partial, top)
        Bundle.open(folder, true, supported, progress)
        if (!folder.renameTo(into)) refuse("${into.name} cannot be made in ${into.parent}: make space")
        return Bundle(into, read)
    }

    /** Counts what is read of the zip itself. */
    private class Counted(stream: InputStream) : FilterInputStream(stream) {
        var read = 0L
            private set

        override fun read(): Int = super.read().also { if (it >= 0) read++ }

        override fun read(bytes: ByteArray, start: Int, length: Int): Int =
            super.read(bytes, start, length).also { if (it > 0) read += it }
    }

    private companion object {
        const val MOST_ENTRIES = 1000

        /** Until the manifest is read, files may have so many times the bytes of the zip so far: weights hardly shrink, texts do by ten. */
        const val LARGEST_RATIO = 32L

        /** Bytes that may be written however small the zip is. */
        const val LEAST = 1L shl 20
    }
}
