package dev.lobit.demo

import android.content.ContentProvider
import android.content.ContentValues
import android.database.Cursor
import android.database.MatrixCursor
import android.net.Uri
import android.os.ParcelFileDescriptor
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import java.io.File
import org.robolectric.Robolectric

/**
 * Another app that has one folder for the system's picker: [name], with [children] by their names; folders among them are empty.
 *
 * It answers as a `DocumentsProvider` does, which Robolectric does not query.
 */
class FakeDocuments : ContentProvider() {
    var name = "story"
    val children = mutableListOf<Pair<String, File>>()

    override fun onCreate() = true

    override fun query(uri: Uri, columns: Array<String>?, selection: String?, arguments: Array<String>?, order: String?): Cursor {
        val cursor = MatrixCursor(columns)
        val id = DocumentsContract.getDocumentId(uri)
        when {
            id != TOP -> cursor.add(id)
            uri.lastPathSegment == "children" -> children.indices.forEach { cursor.add("$it") }
            else -> cursor.add(TOP)
        }
        return cursor
    }

    private fun MatrixCursor.add(id: String) {
        val (name, file) = if (id == TOP) name to null else children[id.toInt()]
        val type = if (file?.isFile == true) "application/octet-stream" else Document.MIME_TYPE_DIR
        val values = mapOf(
            Document.COLUMN_DOCUMENT_ID to id, Document.COLUMN_DISPLAY_NAME to name,
            Document.COLUMN_SIZE to file?.length(), Document.COLUMN_MIME_TYPE to type,
        )
        addRow(columnNames.map { values[it] })
    }

    override fun openFile(uri: Uri, mode: String): ParcelFileDescriptor =
        ParcelFileDescriptor.open(children[DocumentsContract.getDocumentId(uri).toInt()].second, ParcelFileDescriptor.MODE_READ_ONLY)

    override fun getType(uri: Uri): String? = null

    override fun insert(uri: Uri, values: ContentValues?): Uri? = null

    override fun delete(uri: Uri, selection: String?, arguments: Array<String>?) = 0

    override fun update(uri: Uri, values: ContentValues?, selection: String?, arguments: Array<String>?) = 0

    /** The address of a file, as the app asks for it. */
    fun uri(child: String): Uri = DocumentsContract.buildDocumentUriUsingTree(tree, "${children.indexOfFirst { it.first == child }}")

    companion object {
        private const val AUTHORITY = "dev.lobit.test.documents"
        private const val TOP = "top"

        /** What the picker gives for the folder. */
        val tree: Uri get() = DocumentsContract.buildTreeDocumentUri(AUTHORITY, TOP)

        fun installed(): FakeDocuments = Robolectric.buildContentProvider(FakeDocuments::class.java).create(AUTHORITY).get()
    }
}
