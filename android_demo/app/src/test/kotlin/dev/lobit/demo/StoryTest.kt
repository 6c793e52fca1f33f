package dev.lobit.demo

import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ListView
import android.widget.TextView
import dev.lobit.core.Bench
import dev.lobit.core.BenchRequest
import dev.lobit.core.ExecuTorch
import dev.lobit.core.Runtime
import dev.lobit.core.Workload
import dev.lobit.host.Libraries
import java.io.File
import org.json.JSONObject
import org.junit.Assert.assertEquals
import org.junit.Assert.assertTrue
import org.junit.Test
import org.junit.runner.RunWith
import org.robolectric.Robolectric
import org.robolectric.RobolectricTestRunner
import org.robolectric.RuntimeEnvironment
import org.robolectric.annotation.Config

/** The application with the phone's own library for x86_64, and the bundle of the property `lobit.story`. */
class RealApplication : DemoApplication() {
    override fun onCreate() {
        super.onCreate()
        bundleOf("lobit.story").copyRecursively(File(filesDir, "bundles/story"), overwrite = true)
    }

    override fun runtime(): Runtime {
        Libraries.load(System.getProperty("lobit.libraries")!!)
        return ExecuTorch(File(cacheDir, "runtime"))
    }
}

@RunWith(RobolectricTestRunner::class)
@Config(sdk = [34], application = RealApplication::class)
class StoryTest {
    private val app get() = RuntimeEnvironment.getApplication() as RealApplication
    private val expected = System.getProperty("lobit.expected")!!

    private fun texts(activity: ChatActivity): List<String> {
        val adapter = activity.view<ListView>(R.id.messages).adapter
        return List(adapter.count) { adapter.getView(it, null, LinearLayout(activity)).findViewById<TextView>(R.id.text).text.toString() }
    }

    private fun say(activity: ChatActivity, text: String) {
        activity.view<EditText>(R.id.prompt).setText(text)
        activity.view<Button>(R.id.send).performClick()
    }

    @Test
    fun `the app writes the story that lobit writes, through a rotation, a stop and a second time`() {
        val store = app.store
        store.refresh()
        await("the bundle is listed") { store.state.entries.isNotEmpty() }
        val controller = Robolectric.buildActivity(ChatActivity::class.java, ChatActivity.intent(app, "story")).setup()
        await("the model is loaded: ${store.state.problem}") { store.state.open == "story" && store.state.work == null }
        store.change(Settings(0f, System.getProperty("lobit.length")!!.toInt()))
        say(controller.get(), "Once upon a time")
        controller.recreate()
        await("the story is written") { store.state.counts != null && !store.state.answering }
        assertEquals(expected, texts(controller.get()).last())
        assertTrue(store.state.counts!!.generatedTokens > 0)
        store.change(Settings(0f, 100_000))
        say(controller.get(), "Once upon a time")
        await("it begins again") { texts(controller.get()).size == 4 && texts(controller.get()).last().isNotEmpty() }
        store.stop()
        await("it ends, stopped or at the context's end") { !store.state.answering }
        assertTrue(texts(controller.get()).last().startsWith(expected.take(5)))
        store.dismissProblem()
        store.close()
        store.open("story")
        await("it is loaded again") { store.state.open == "story" && store.state.work == null }
        store.change(Settings(0f, System.getProperty("lobit.length")!!.toInt()))
        say(controller.get(), "Once upon a time")
        await("the story again") { store.state.counts != null && !store.state.answering }
        assertEquals(expected, texts(controller.get()).last())
    }

    @Test
    fun `an answer that fills the context stays and says so`() {
        val store = app.store
        store.refresh()
        await("the bundle is listed") { store.state.entries.isNotEmpty() }
        val activity = Robolectric.buildActivity(ChatActivity::class.java, ChatActivity.intent(app, "story")).setup().get()
        await("the model is loaded: ${store.state.problem}") { store.state.open == "story" && store.state.work == null }
        store.change(Settings(0f, 100_000))
        say(activity, "Once upon a time")
        await("it ends") { !store.state.answering }
        assertTrue(store.state.problem, "tokens is full" in store.state.problem.orEmpty())
        assertTrue(texts(activity).last().startsWith(expected))
    }

    @Test
    fun `the app's benchmark times the real program`() {
        val store = app.store
        store.bench("story", BenchRequest(listOf(32), listOf(8), listOf(0, 16), 2))
        await("the result: ${store.state.problem}") { store.state.bench?.running == false }
        val result: JSONObject = store.state.bench!!.result!!
        val rows = List(4) { result.getJSONArray("rows").getJSONObject(it) }
        val names = rows.map { Workload(it.getString("phase"), it.getInt("tokens"), it.getInt("depth")).name }
        assertEquals(listOf("pp32", "pp32@d16", "tg8", "tg8@d16"), names.sorted())
        assertTrue(rows.all { Bench.speeds(it).all { speed -> speed > 0 } })
    }
}
