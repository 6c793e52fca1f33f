package dev.lobit.demo

import android.os.Handler
import android.os.Looper
import android.view.View
import android.widget.Button
import android.widget.EditText
import dev.lobit.core.BenchRequest
import java.io.File
import java.util.concurrent.CountDownLatch
import java.util.concurrent.Executors
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Before
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.android.controller.ActivityController

/** What takes long can be cancelled at each of its stages, and begun again. */
class CancelTest : AppTest() {
    private val gate = CountDownLatch(1)

    @Before
    fun prepare() {
        bundleOf("lobit.bundle").copyRecursively(File(app.filesDir, "bundles/other"))
        store.refresh()
        await("the bundles are listed") { store.state.entries.size == 2 }
        app.fake.gate = gate
    }

    /** A chat's screen whose bundle the runtime is loading. */
    private fun loading() = Robolectric.buildActivity(ChatActivity::class.java, ChatActivity.intent(app, "demo")).setup().also {
        await("the runtime loads") { app.fake.asked.get() == 1 }
        await("the screen says so") { store.state.work?.what == app.getString(R.string.loading, "demo") }
    }

    private fun assertNothingIsOpen(store: Store = this.store) {
        assertNull(store.state.open)
        assertNull(store.state.work)
        assertNull(store.state.problem)
    }

    /** Waits until all engines but so many are closed and the store is idle. */
    private fun awaitEngines(asked: Int, open: Int) {
        await("engines are closed") { app.fake.asked.get() == asked && app.fake.closed.get() == asked - open }
        var idle = false
        store.refresh()
        val observer: (State) -> Unit = { idle = true }
        store.observe(observer)
        await("all is done") { idle }
        store.forget(observer)
    }

    @Test
    fun `the button at a model that the runtime loads closes the screen, and the model once it is there`() {
        val activity = loading().get()
        val cancel = activity.view<Button>(R.id.cancel)
        assertEquals(View.VISIBLE, cancel.visibility)
        assertTrue("${cancel.contentDescription}", app.getString(R.string.loading, "demo") in cancel.contentDescription)
        cancel.performClick()
        assertTrue(activity.isFinishing)
        assertNothingIsOpen()
        gate.countDown()
        awaitEngines(asked = 1, open = 0)
        assertNothingIsOpen()
    }

    @Suppress("DEPRECATION")
    private fun goBack(screen: ActivityController<ChatActivity>) {
        screen.get().onBackPressed()
        assertTrue(screen.get().isFinishing)
        screen.pause().stop().destroy()
    }

    @Test
    fun `Back gives up a bundle that is being loaded and keeps one that is loaded`() {
        goBack(loading())
        assertNothingIsOpen()
        gate.countDown()
        awaitEngines(asked = 1, open = 0)
        val again = Robolectric.buildActivity(ChatActivity::class.java, ChatActivity.intent(app, "demo")).setup()
        await("it is loaded") { store.state.open == "demo" && store.state.work == null }
        goBack(again)
        awaitEngines(asked = 2, open = 1)
        assertEquals("demo", store.state.open)
    }

    @Test
    fun `a rotation or another app in front cancels nothing`() {
        val controller = loading()
        controller.pause().stop().start().resume() // another app was in front
        controller.recreate()
        assertEquals(View.VISIBLE, controller.get().view<View>(R.id.cancel).visibility)
        gate.countDown()
        await("it is loaded") { controller.get().view<Button>(R.id.send).isEnabled }
        assertEquals(View.GONE, controller.get().view<View>(R.id.cancel).visibility)
        awaitEngines(asked = 1, open = 1)
    }

    @Test
    fun `a load that is cancelled and begun again at once gives a conversation`() {
        loading()
        store.cancelWork()
        store.open("demo")
        assertEquals("demo", store.state.open)
        gate.countDown()
        awaitEngines(asked = 2, open = 1)
        await("it is loaded") { store.state.open == "demo" && store.state.work == null }
        store.say("Hello")
        await("the answer") { !store.state.answering }
        assertEquals(listOf("Hello", "Once there was"), store.state.messages.map { it.text })
    }

    @Test
    fun `a bundle that is opened while another is loaded takes its place`() {
        loading()
        store.open("other")
        gate.countDown()
        awaitEngines(asked = 2, open = 1)
        await("it is loaded") { store.state.work == null }
        assertEquals("other", store.state.open)
        assertNull(store.state.problem)
    }

    @Test
    fun `a load that is cancelled while hashes are compared never comes to the runtime`() {
        val reached = CountDownLatch(1)
        val texts = object : Store.Texts {
            override fun copying() = "copying"

            override fun checking(name: String): String {
                reached.countDown()
                gate.await()
                return "checking $name"
            }

            override fun loading(name: String) = "loading $name"

            override fun measuring(row: String, done: Int, all: Int) = row
        }
        val worker = Executors.newSingleThreadExecutor()
        val handler = Handler(Looper.getMainLooper())
        val own = Store({ app.fake }, app.library, app.probe, texts, worker) { handler.post(it) }
        own.open("demo")
        reached.await()
        own.cancelWork()
        assertNothingIsOpen(own)
        gate.countDown()
        val done = worker.submit {}
        await("it ends") { done.isDone }
        assertNothingIsOpen(own)
        assertEquals(0, app.fake.asked.get())
        own.open("demo")
        await("the second time it is loaded") { app.fake.asked.get() == 1 && own.state.work == null }
        assertEquals("demo", own.state.open)
        worker.shutdown()
    }

    @Test
    fun `a failing load that was cancelled tells nothing and the next one does`() {
        File(app.filesDir, "bundles/demo/model.pte").appendBytes(byteArrayOf(1))
        store.open("demo")
        store.cancelWork()
        awaitEngines(asked = 0, open = 0)
        assertNothingIsOpen()
        store.open("demo")
        await("the reason") { "model.pte" in store.state.problem.orEmpty() }
        assertNull(store.state.open)
    }

    @Test
    fun `a benchmark whose model is being loaded is stopped at once and can be started again`() {
        val activity = Robolectric.buildActivity(BenchActivity::class.java, BenchActivity.intent(app, "demo")).setup().get()
        mapOf(R.id.prompts to "16", R.id.generates to "4", R.id.repetitions to "1").forEach { (id, text) ->
            activity.view<EditText>(id).setText(text)
        }
        val start = activity.view<Button>(R.id.start)
        start.performClick()
        await("the runtime loads") { app.fake.asked.get() == 1 }
        assertEquals(app.getString(R.string.stop), start.text)
        start.performClick()
        assertEquals(app.getString(R.string.start), start.text)
        assertNothingIsOpen()
        start.performClick()
        gate.countDown()
        await("the second one ends") { store.state.bench?.running == false }
        awaitEngines(asked = 2, open = 0)
        assertEquals(2, store.state.bench!!.result!!.getJSONArray("rows").length())
        assertNull(store.state.problem)
    }

    @Test
    fun `a bundle that is opened during a benchmark is loaded when that has ended or was cancelled`() {
        store.bench("other", BenchRequest(listOf(4), listOf(4), listOf(0), 1))
        await("the runtime loads") { app.fake.asked.get() == 1 }
        store.open("demo")
        assertTrue(store.state.bench!!.running)
        store.cancelBench()
        assertFalse(store.state.bench!!.running)
        gate.countDown()
        awaitEngines(asked = 2, open = 1)
        await("the conversation") { store.state.open == "demo" && store.state.work == null }
        assertNull(store.state.bench!!.result)
    }
}
