package dev.lobit.demo

import java.io.File
import org.junit.Assert.assertEquals
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Test
import org.robolectric.Shadows.shadowOf

/** A folder that the user picks comes into the app whole, or not at all. */
class FolderTest : AppTest() {
    private lateinit var documents: FakeDocuments

    @Before
    fun fillFolder() {
        documents = FakeDocuments.installed()
        documents.children += bundleOf("lobit.bundle").listFiles()!!.filter { it.isFile }.map { it.name to it }
    }

    private fun pick() {
        store.takeFolder(app.contentResolver, FakeDocuments.tree)
        awaitCopy()
    }

    private fun temporary(name: String, content: ByteArray) = File(app.cacheDir, name).apply { writeBytes(content) }

    @Test
    fun `a folder becomes a bundle of its name`() {
        pick()
        assertNull(store.state.problem)
        assertEquals(listOf("demo", "story"), names())
        val files = documents.children.associate { (name, file) -> name to file.length() }
        assertEquals(files, File(root, "story").listFiles()!!.associate { it.name to it.length() })
        assertTrue(store.state.entries.all { it.bundle != null })
    }

    @Test
    fun `a folder with a changed file is refused and leaves nothing`() {
        val index = documents.children.indexOfFirst { it.first == "model.pte" }
        val content = documents.children[index].second.readBytes().also { it[100] = (it[100] + 1).toByte() }
        documents.children[index] = "model.pte" to temporary("changed", content)
        pick()
        assertTrue(store.state.problem, "model.pte" in store.state.problem.orEmpty())
        assertEquals(listOf("demo"), names())
    }

    @Test
    fun `a folder that lacks a file is refused and leaves nothing`() {
        documents.children.removeIf { it.first == "model.pte" }
        pick()
        assertTrue(store.state.problem, "model.pte is missing" in store.state.problem.orEmpty())
        assertEquals(listOf("demo"), names())
    }

    @Test
    fun `names that lead elsewhere, hidden files and folders inside are not taken`() {
        val file = temporary("more", "more".toByteArray())
        documents.children += listOf("../escaped", "a/b", "/absolute", "..", ".hidden").map { it to file }
        documents.children += "inside" to File(app.cacheDir, "inside").apply { mkdir() }
        val taken = documents.children.map { it.first }.filter { '/' !in it && !it.startsWith(".") && it != "inside" }
        pick()
        assertNull(store.state.problem)
        assertEquals(taken.sorted(), File(root, "story").list()!!.sorted())
        assertEquals(listOf("demo", "story"), names())
    }

    @Test
    fun `a folder's own name cannot lead elsewhere`() {
        documents.name = "../../story"
        pick()
        assertEquals(listOf("demo", "story"), names())
    }

    @Test
    fun `a folder of a name that is taken is refused and the old bundle stays`() {
        documents.name = "demo"
        pick()
        assertTrue(store.state.problem, "remove it first" in store.state.problem.orEmpty())
        assertEquals(listOf("demo"), names())
    }

    @Test
    fun `a copy that is cancelled in the middle of a file leaves nothing`() {
        val content = documents.children.first { it.first == "model.pte" }.second.readBytes()
        val stream = HeldStream(content, content.size / 2)
        shadowOf(app.contentResolver).registerInputStream(documents.uri("model.pte"), stream)
        store.takeFolder(app.contentResolver, FakeDocuments.tree)
        await("a part is copied") { File(root, "story.partial/model.pte").length() > 0 }
        await("the part is told") { (store.state.work?.share ?: 0f) > 0f }
        store.cancelWork()
        assertNull(store.state.work)
        stream.gate.countDown()
        await("nothing is left") { names() == listOf("demo") }
        assertNull(store.state.problem)
    }
}
