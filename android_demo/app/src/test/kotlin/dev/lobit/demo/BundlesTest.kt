package dev.lobit.demo

import android.net.Uri
import android.view.View
import android.widget.Button
import dev.lobit.core.LobitException
import java.io.ByteArrayInputStream
import java.io.ByteArrayOutputStream
import java.io.File
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertThrows
import org.junit.Assert.assertTrue
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.Shadows.shadowOf

/** Bundles come into the app whole, or not at all. */
class BundlesTest : AppTest() {
    private fun zipped(change: (String, ByteArray) -> ByteArray = { _, bytes -> bytes }): ByteArray {
        val out = ByteArrayOutputStream()
        ZipOutputStream(out).use { zip ->
            for (file in bundleOf("lobit.bundle").walk().filter { it.isFile }) {
                zip.putNextEntry(ZipEntry("anything/${file.name}"))
                zip.write(change(file.name, file.readBytes()))
            }
        }
        return out.toByteArray()
    }

    private fun pick(name: String, content: ByteArray) {
        val uri = Uri.parse("content://picker/$name")
        shadowOf(app.contentResolver).registerInputStream(uri, ByteArrayInputStream(content))
        store.takeZip(app.contentResolver, uri)
        awaitCopy()
    }

    private fun changed(bytes: ByteArray) = bytes.clone().also { it[100] = (it[100] + 1).toByte() }

    @Test
    fun `a zip that the user picks becomes a bundle of its name`() {
        pick("story.zip", zipped())
        assertEquals(null, store.state.problem)
        assertEquals(listOf("demo", "story"), store.state.entries.map { it.name })
        assertTrue(store.state.entries.all { it.bundle != null })
        assertEquals(listOf("demo", "story"), names())
    }

    @Test
    fun `a zip with a changed file is refused and leaves nothing`() {
        pick("story.zip", zipped { name, bytes -> if (name == "model.pte") changed(bytes) else bytes })
        assertTrue(store.state.problem, "model.pte" in store.state.problem.orEmpty())
        assertEquals(listOf("demo"), names())
    }

    @Test
    fun `what is no zip is refused and leaves nothing`() {
        pick("story.zip", "no zip".toByteArray())
        assertEquals(listOf("demo"), names())
    }

    @Test
    fun `a bundle of a name that is taken is refused and the old one stays`() {
        val before = File(root, "demo/manifest.json").lastModified()
        pick("demo.zip", zipped())
        assertTrue(store.state.problem, "remove it first" in store.state.problem.orEmpty())
        assertEquals(before, File(root, "demo/manifest.json").lastModified())
    }

    @Test
    fun `names that lead out of the app's folder are refused`() {
        for (name in listOf("../demo", "/etc", ".", "..", "", "a/b")) {
            assertThrows(LobitException::class.java) { app.library.checked(name) }
        }
    }

    @Test
    fun `a copy that is cancelled leaves nothing and the zip can be picked again`() {
        val activity = Robolectric.buildActivity(BundlesActivity::class.java).setup().get()
        val content = zipped()
        val stream = HeldStream(content, content.size / 2)
        val uri = Uri.parse("content://picker/story.zip")
        shadowOf(app.contentResolver).registerInputStream(uri, stream)
        store.takeZip(app.contentResolver, uri)
        await("a part is copied") { File(root, "story.partial").walk().any { it.length() > 0 } }
        val cancel = activity.view<Button>(R.id.cancel)
        assertEquals(View.VISIBLE, cancel.visibility)
        assertTrue("${cancel.contentDescription}", app.getString(R.string.copying) in cancel.contentDescription)
        cancel.performClick()
        assertEquals(View.GONE, cancel.visibility)
        assertNull(store.state.work)
        stream.gate.countDown()
        await("nothing is left") { names() == listOf("demo") }
        pick("story.zip", content)
        assertNull(store.state.problem)
        assertEquals(listOf("demo", "story"), names())
    }
}
