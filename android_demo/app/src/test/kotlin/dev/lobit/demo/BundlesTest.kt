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
import org.junit.Before
import org.junit.Test
import org.junit.runner.RunWith
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.Shadows.shadowOf
import org.robolectric.annotation.Config

/** Bundles come into the app whole, or not at all. */
@RunWith(RobolectricTestRunner::class)
@Config(sdk = [34], application = FakeApplication::class)
class BundlesTest {
    private val app get() = RuntimeEnvironment.getApplication() as FakeApplication
    private val store get() = app.store
    private val root get() = File(app.filesDir, "bundles")

    @Before
    fun readBundles() {
        store.refresh()
        await("the bundle is listed") { store.state.entries.isNotEmpty() }
    }

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
        await("it is copied or refused") { store.state.work == null && (store.state.problem != null || store.state.entries.size > 1) }
    }

    private fun changed(bytes: ByteArray) = bytes.clone().also { it[100] = (it[100] + 1).toByte() }

    private fun names() = root.list().orEmpty().sorted()

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
