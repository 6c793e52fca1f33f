package dev.lobit.demo

import android.content.Intent
import android.view.View
import android.widget.TextView
import dev.lobit.core.Service
import dev.lobit.core.Service.Companion.frame
import dev.lobit.demo.service.ServiceActivity
import java.io.File
import java.nio.ByteBuffer
import org.json.JSONArray
import org.json.JSONObject
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Test
import org.robolectric.Robolectric

/** What a computer gets from the service, and who else gets nothing. */
class ServiceTest : AppTest() {
    @Before
    fun addSecondBundle() {
        bundleOf("lobit.bundle").copyRecursively(File(app.filesDir, "bundles/other"))
    }

    private fun intent(name: String?) = Intent(app, ServiceActivity::class.java).putExtra("bundle", name)

    private fun service(name: String? = "demo") = Robolectric.buildActivity(ServiceActivity::class.java, intent(name)).setup()

    private fun text(activity: ServiceActivity) = activity.view<TextView>(R.id.work).text.toString()

    private fun waiting(name: String) = app.getString(R.string.service_waiting, name)

    private fun connect(uid: Int = SHELL) = app.listeners.last().connect(uid)

    /** The next frame that a client gets: its kind and its content. */
    private fun FakeClient.next(): Pair<Int, ByteArray> =
        answers.readByte().toInt() to ByteArray(answers.readInt()).also(answers::readFully)

    private fun FakeClient.json(kind: Int): JSONObject {
        val (told, content) = next()
        assertEquals(String(content), kind, told)
        return JSONObject(String(content))
    }

    private fun FakeClient.step(position: Long, vararg tokens: Long) {
        val content = ByteBuffer.allocate(Long.SIZE_BYTES * (1 + tokens.size)).putLong(position)
        tokens.forEach(content::putLong)
        requests.frame(Service.STEP, content.array())
    }

    private fun awaitEnd(client: FakeClient) = await("the client's connection ends") { client.isClosed }

    @Test
    fun `it listens on its own name and says for whom it waits`() {
        val activity = service().get()
        assertEquals(ServiceActivity.SOCKET, app.listeners.single().name)
        assertEquals(waiting("demo"), text(activity))
    }

    @Test
    fun `adb's shell is told what it runs on and gets the logits of its tokens`() {
        service()
        val client = connect()
        val about = client.json(Service.DONE)
        assertEquals("FakeBackend", about.getJSONArray("backends").getString(0))
        assertEquals(34, about.getJSONObject("device").getInt("sdk"))
        assertTrue(about.has("app"))
        client.step(0, 1, 2, 3)
        val (kind, logits) = client.next()
        assertEquals(Service.DONE, kind)
        assertEquals(app.library.checked("demo").manifest.model.vocabSize.toInt(), logits.size / Float.SIZE_BYTES)
        client.requests.close()
        awaitEnd(client)
        await("the engine is closed") { app.fake.asked.get() == 1 && app.fake.closed.get() == 1 }
    }

    @Test
    fun `a benchmark gives its rows, each told before it begins`() {
        val activity = service().get()
        val client = connect()
        client.json(Service.DONE)
        val request = JSONObject().put("prompts", JSONArray(listOf(8))).put("generates", JSONArray(listOf(4))).put("repetitions", 2)
        client.requests.frame(Service.BENCH, request.toString().toByteArray())
        assertEquals(listOf("pp8", "tg4", "all rows"), List(3) { client.json(Service.PROGRESS).getString("row") })
        await("the screen says that a computer measures") { text(activity) == app.getString(R.string.service_running, "demo", "all rows") }
        val rows = client.json(Service.DONE).getJSONArray("rows")
        assertEquals(listOf(2, 2), List(2) { rows.getJSONObject(it).getJSONArray("samples_ns").length() })
        client.requests.close()
        await("the screen waits again") { text(activity) == waiting("demo") }
    }

    @Test
    fun `another app's user is refused without a look at what it sends, and the next client is served`() {
        service()
        val stranger = connect(uid = 10_123)
        awaitEnd(stranger)
        assertFalse(stranger.wasRead)
        assertEquals("it gets no byte", -1, stranger.answers.read())
        connect().json(Service.DONE)
        connect(uid = 0)
    }

    @Test
    fun `root, as on emulators, is served`() {
        service()
        connect(uid = 0).json(Service.DONE)
    }

    @Test
    fun `a bundle that is not there or not in the app's folder is told with the reason`() {
        for ((name, reason) in listOf("none" to "none is no bundle", "../demo" to "no name of a bundle", null to "no name of a bundle")) {
            val controller = service(name)
            val (kind, content) = connect().next()
            assertEquals(Service.FAILED, kind)
            assertTrue(String(content), reason in String(content))
            controller.destroy()
        }
    }

    @Test
    fun `a request that fails is told and the next one is answered`() {
        service()
        val client = connect()
        client.json(Service.DONE)
        app.fake.failure = IllegalStateException("broken")
        client.step(0, 1)
        assertEquals(Service.FAILED to "broken", client.next().let { (kind, content) -> kind to String(content) })
        app.fake.failure = null
        client.step(0, 1)
        assertEquals(Service.DONE, client.next().first)
    }

    @Test
    fun `a new intent ends the former socket with its client and opens the new bundle`() {
        val controller = service()
        val (first, client) = app.listeners.single() to connect()
        client.json(Service.DONE)
        client.step(0, 1)
        client.next()
        controller.newIntent(intent("other"))
        assertTrue(first.isClosed && client.isClosed)
        await("its engine is closed") { app.fake.closed.get() == 1 }
        assertEquals(2, app.listeners.size)
        assertFalse(app.listeners.last().isClosed)
        await("the screen waits for the new one") { text(controller.get()) == waiting("other") }
        connect().json(Service.DONE)
    }

    @Test
    fun `leaving the screen ends the socket and its client`() {
        val controller = service()
        val client = connect()
        client.json(Service.DONE)
        client.step(0, 1)
        client.next()
        controller.pause().stop().destroy()
        assertTrue(app.listeners.single().isClosed && client.isClosed)
        await("its engine is closed") { app.fake.closed.get() == 1 }
    }

    @Test
    fun `a conversation is ended so that nothing else takes memory and time`() {
        app.store.open("demo")
        await("the model is loaded") { app.store.state.open == "demo" && app.store.state.work == null }
        service()
        await("it is closed") { app.store.state.open == null && app.fake.closed.get() == 1 }
    }

    @Test
    fun `a socket that cannot be opened is told`() {
        app.taken = "Address already in use"
        val activity = service().get()
        assertTrue(text(activity), "Address already in use" in text(activity))
        assertEquals(View.VISIBLE, activity.view<View>(R.id.work).visibility)
    }

    private companion object {
        const val SHELL = 2000
    }
}
