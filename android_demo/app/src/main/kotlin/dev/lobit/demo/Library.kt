package dev.lobit.demo

import android.content.ContentResolver
import android.content.res.AssetManager
import android.net.Uri
import android.provider.DocumentsContract
import dev.lobit.core.Bundle
import dev.lobit.core.LobitException
import dev.lobit.core.Progress
import dev.lobit.core.Supported
import dev.lobit.core.forEachPiece
import java.io.File
import java.io.IOException
import java.io.InputStream

/** A bundle that the app has, or the sentence that says why it cannot be used. */
data class Entry(val folder: File, val bundle: Bundle?, val problem: String?) {
    val name: String get() = folder.name
}

/** The bundles in the app's own folder. All functions read or write files: they are called on a background thread. */
class Library(private val root: File, private val assets: AssetManager, private val supported: Supported) {
    /** All bundles, by name. Files are only measured here; their hashes are compared when one is loaded. */
    fun entries(): List<Entry> = root.listFiles { file -> file.isDirectory && !file.name.endsWith(PARTIAL) }.orEmpty()
        .sortedBy { it.name }
        .map { folder ->
            try {
                Entry(folder, Bundle.open(folder, checkHashes = false, supported), null)
            } catch (error: LobitException) {
                Entry(folder, null, error.message)
            }
        }

    /** Opens a bundle and compares the hashes of all of its files. */
    fun checked(name: String, progress: Progress = { _, _ -> }): Bundle =
        Bundle.open(folder(name), supported = supported, progress = progress)

    /** The folder of a bundle. Names of folders elsewhere are refused. */
    private fun folder(name: String): File {
        if (name.isEmpty() || name.startsWith(".") || '/' in name) throw LobitException("$name is no name of a bundle")
        return File(root, name)
    }

    fun remove(name: String) {
        folder(name).deleteRecursively()
    }

    /** Unpacks the bundles inside the APK that are not there yet. */
    fun unpackAssets() {
        for (name in assets.list(ASSETS).orEmpty()) {
            if (!File(root, name).isDirectory) take(name) { into -> copyAssets("$ASSETS/$name", into) }
        }
    }

    private fun copyAssets(path: String, into: File) {
        into.mkdirs()
        for (name in assets.list(path).orEmpty()) {
            if (assets.list("$path/$name").orEmpty().isNotEmpty()) copyAssets("$path/$name", File(into, name))
            else assets.open("$path/$name").use { copy(it, File(into, name)) }
        }
    }

    /** Copies a bundle out of a zip file that the user picked; returns its name. */
    fun takeZip(resolver: ContentResolver, uri: Uri, progress: Progress): String {
        val name = nameOf(resolver, uri).removeSuffix(".zip")
        val stream = resolver.openInputStream(uri) ?: throw LobitException("$name cannot be read: pick it again")
        stream.use { Bundle.unzip(it, free(name), supported, progress) }
        return name
    }

    /** Copies a bundle out of a folder that the user picked; returns its name. */
    fun takeFolder(resolver: ContentResolver, tree: Uri, progress: Progress): String {
        val top = DocumentsContract.getTreeDocumentId(tree)
        val name = nameOf(resolver, DocumentsContract.buildDocumentUriUsingTree(tree, top))
        return take(name, progress) { into ->
            into.mkdirs()
            val files = children(resolver, tree, top)
            val total = files.sumOf { it.bytes }
            var done = 0L
            for (child in files) {
                val from = DocumentsContract.buildDocumentUriUsingTree(tree, child.id)
                val stream = resolver.openInputStream(from) ?: throw LobitException("${child.name} cannot be read: pick the folder again")
                stream.use { input -> done += copy(input, File(into, child.name)) { progress(done + it, total) } }
            }
        }
    }

    private data class Child(val id: String, val name: String, val bytes: Long)

    /** The files in a folder of the system's picker; a bundle has no folders inside. */
    private fun children(resolver: ContentResolver, tree: Uri, top: String): List<Child> {
        val columns = arrayOf(
            DocumentsContract.Document.COLUMN_DOCUMENT_ID, DocumentsContract.Document.COLUMN_DISPLAY_NAME,
            DocumentsContract.Document.COLUMN_SIZE, DocumentsContract.Document.COLUMN_MIME_TYPE,
        )
        val found = mutableListOf<Child>()
        resolver.query(DocumentsContract.buildChildDocumentsUriUsingTree(tree, top), columns, null, null, null)?.use { rows ->
            while (rows.moveToNext()) {
                val name = rows.getString(1)
                val isFile = rows.getString(3) != DocumentsContract.Document.MIME_TYPE_DIR
                if (isFile && '/' !in name && !name.startsWith(".")) found += Child(rows.getString(0), name, rows.getLong(2))
            }
        }
        return found
    }

    private fun nameOf(resolver: ContentResolver, uri: Uri): String {
        val columns = arrayOf(DocumentsContract.Document.COLUMN_DISPLAY_NAME)
        val told = resolver.query(uri, columns, null, null, null)?.use { rows -> if (rows.moveToFirst()) rows.getString(0) else null }
        return (told ?: uri.lastPathSegment ?: "bundle").substringAfterLast('/').trimStart('.').ifEmpty { "bundle" }
    }

    /** The place of a new bundle. */
    private fun free(name: String): File {
        val place = folder(name)
        if (place.exists()) throw LobitException("a bundle named $name is here already: remove it first")
        root.mkdirs()
        return place
    }

    /** Lets [fill] write a folder beside its place, checks it as a bundle, and puts it there whole or not at all. */
    private fun take(name: String, progress: Progress = { _, _ -> }, fill: (File) -> Unit): String {
        val place = free(name)
        val partial = File(root, name + PARTIAL)
        partial.deleteRecursively()
        try {
            fill(partial)
            Bundle.open(partial, supported = supported, progress = progress)
            if (!partial.renameTo(place)) throw LobitException("$name cannot be put into the app's folder")
            return name
        } catch (error: IOException) {
            throw LobitException("$name cannot be copied (${error.message}): is there space left?", error)
        } finally {
            partial.deleteRecursively()
        }
    }

    /** Copies a file; [progress] is told the bytes so far. Returns their number at the end. */
    private fun copy(from: InputStream, to: File, progress: (Long) -> Unit = {}): Long = to.outputStream().use { output ->
        from.forEachPiece { buffer, size, done ->
            output.write(buffer, 0, size)
            progress(done)
        }
    }

    companion object {
        /** The folder of the bundles inside the APK. */
        const val ASSETS = "bundles"
        const val PARTIAL = ".partial"
    }
}
