package dev.lobit.demo

import android.app.AlertDialog
import android.content.Intent
import android.os.Looper
import android.view.View
import android.view.ViewGroup
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ListView
import android.widget.TableLayout
import android.widget.TextView
import dev.lobit.core.LobitException
import java.io.File
import org.json.JSONObject
import org.junit.Assert.assertEquals
import org.junit.Assert.assertFalse
import org.junit.Assert.assertNotNull
import org.junit.Assert.assertNull
import org.junit.Assert.assertTrue
import org.junit.Test
import org.robolectric.Robolectric
import org.robolectric.Shadows.shadowOf
import org.robolectric.shadows.ShadowDialog

class ScreensTest : AppTest() {
    private fun chat() = Robolectric.buildActivity(ChatActivity::class.java, ChatActivity.intent(app, "demo")).setup().also {
        await("the model is loaded") { store.state.open == "demo" && store.state.work == null }
    }

    private fun say(activity: ChatActivity, text: String) {
        activity.view<EditText>(R.id.prompt).setText(text)
        activity.view<Button>(R.id.send).performClick()
    }

    private fun texts(activity: ChatActivity): List<String> {
        val adapter = activity.view<ListView>(R.id.messages).adapter
        return List(adapter.count) { adapter.getView(it, null, LinearLayout(activity)).findViewById<TextView>(R.id.text).text.toString() }
    }

    @Test
    fun `the first screen lists the bundles and opens one`() {
        val activity = Robolectric.buildActivity(BundlesActivity::class.java).setup().get()
        val list = activity.view<ListView>(R.id.list)
        await("a row") { list.adapter.count == 1 }
        val row = list.adapter.getView(0, null, list)
        assertEquals("demo", row.findViewById<TextView>(R.id.name).text.toString())
        assertTrue(row.findViewById<TextView>(R.id.what).text.contains("8da4w-g32"))
        assertEquals(View.GONE, activity.view<View>(R.id.empty).visibility)
        shadowOf(list).performItemClick(0)
        assertEquals(BundleActivity::class.java.name, shadowOf(activity).nextStartedActivity.component?.className)
    }

    @Test
    fun `a bundle says what it is before it is loaded`() {
        val activity = Robolectric.buildActivity(BundleActivity::class.java, BundleActivity.intent(app, "demo")).setup().get()
        val facts = activity.view<LinearLayout>(R.id.facts)
        val text = List(facts.childCount) { facts.getChildAt(it).findViewById<TextView>(R.id.value).text.toString() }.joinToString("\n")
        for (told in listOf("mobilellm_p1", "8da4w-g32", "192 tokens", "int8", "XnnpackBackend", "executorch 1.5.1", "free")) {
            assertTrue("$told in $text", told in text)
        }
        assertNull(store.state.open)
    }

    @Test
    fun `a bundle that does not fit the memory is loaded only when the user wants it`() {
        shadowOf(app.getSystemService(android.content.Context.ACTIVITY_SERVICE) as android.app.ActivityManager)
            .setMemoryInfo(android.app.ActivityManager.MemoryInfo().apply { availMem = 1000 })
        val activity = Robolectric.buildActivity(BundleActivity::class.java, BundleActivity.intent(app, "demo")).setup().get()
        activity.view<Button>(R.id.chat).performClick()
        assertNull(shadowOf(activity).nextStartedActivity)
        (ShadowDialog.getLatestDialog() as AlertDialog).getButton(AlertDialog.BUTTON_POSITIVE).performClick()
        shadowOf(Looper.getMainLooper()).idle()
        assertEquals(ChatActivity::class.java.name, shadowOf(activity).nextStartedActivity.component?.className)
    }

    @Test
    fun `an answer appears with its counts`() {
        val activity = chat().get()
        say(activity, "Tell me a story")
        await("the answer") { store.state.counts != null && !store.state.answering }
        assertEquals(listOf("Tell me a story", "Once there was"), texts(activity))
        await("the counts") { "written" in activity.view<TextView>(R.id.work).text }
        assertEquals("", activity.view<EditText>(R.id.prompt).text.toString())
        assertEquals("Model: Once there was", messageView(activity, 1).contentDescription)
    }

    private fun messageView(activity: ChatActivity, index: Int): TextView {
        val adapter = activity.view<ListView>(R.id.messages).adapter
        return adapter.getView(index, null, LinearLayout(activity)).findViewById(R.id.text)
    }

    @Test
    fun `a rotation in the middle of an answer changes nothing`() {
        app.fake.byHand = true
        val controller = chat()
        say(controller.get(), "Hello")
        app.fake.word()
        await("the first word") { texts(controller.get()) == listOf("Hello", "Once") }
        controller.recreate()
        assertEquals(listOf("Hello", "Once"), texts(controller.get()))
        assertEquals(app.getString(R.string.stop), controller.get().view<Button>(R.id.send).text)
        repeat(2) { app.fake.word() }
        await("the rest") { !store.state.answering }
        assertEquals(listOf("Hello", "Once there was"), texts(controller.get()))
    }

    @Test
    fun `an answer is stopped after its current word and the conversation goes on`() {
        app.fake.byHand = true
        val activity = chat().get()
        say(activity, "Hello")
        app.fake.word()
        await("the first word") { texts(activity).last() == "Once" }
        activity.view<Button>(R.id.send).performClick()
        await("it stops") { !store.state.answering }
        assertEquals(listOf("Hello", "Once"), texts(activity))
        app.fake.byHand = false
        say(activity, "More")
        await("the next answer") { !store.state.answering }
        assertEquals(listOf("Hello", "Once", "More", "Once there was"), texts(activity))
    }

    @Test
    fun `a new conversation forgets the old one`() {
        val activity = chat().get()
        say(activity, "Hello")
        await("the answer") { !store.state.answering }
        shadowOf(activity).clickMenuItem(R.string.new_conversation)
        await("nothing is left") { texts(activity).isEmpty() }
    }

    @Test
    fun `a failing runtime is a sentence and the conversation stays as it was`() {
        val activity = chat().get()
        say(activity, "Hello")
        await("the answer") { !store.state.answering }
        for (failure in listOf(LobitException("the phone is too hot"), IllegalStateException("broken"), OutOfMemoryError("no room"))) {
            app.fake.failure = failure
            say(activity, "More")
            await("it failed") { !store.state.answering }
            await("the sentence") { failure.message!! in activity.view<TextView>(R.id.problem).text }
            assertEquals(listOf("Hello", "Once there was"), texts(activity))
            store.dismissProblem()
        }
    }

    @Test
    fun `a bundle that was changed is refused with the reason`() {
        File(app.filesDir, "bundles/demo/model.pte").appendBytes(byteArrayOf(1))
        val activity = Robolectric.buildActivity(ChatActivity::class.java, ChatActivity.intent(app, "demo")).setup().get()
        await("the reason") { "model.pte" in activity.view<TextView>(R.id.problem).text }
        assertNull(store.state.open)
        assertFalse(activity.view<View>(R.id.send).isEnabled)
    }

    @Test
    fun `settings out of range are refused`() {
        assertEquals(Settings(0.5f, 20, "Be brief."), ChatActivity.settingsOf("0,5", "20", "Be brief."))
        for ((temperature, length) in listOf("-1" to "20", "3" to "20", "hot" to "20", "0" to "0", "0" to "many")) {
            assertNull(ChatActivity.settingsOf(temperature, length, ""))
        }
    }

    @Test
    fun `an answer has as many words as the settings say`() {
        val activity = chat().get()
        store.change(store.state.settings.copy(length = 2))
        say(activity, "Hello")
        await("the answer") { !store.state.answering }
        assertEquals("Once there", texts(activity).last())
    }

    @Test
    fun `a benchmark is shown as a table and a chart and can be shared`() {
        val activity = Robolectric.buildActivity(BenchActivity::class.java, BenchActivity.intent(app, "demo")).setup().get()
        mapOf(R.id.prompts to "16,32", R.id.generates to "4", R.id.depths to "0,400", R.id.repetitions to "3").forEach { (id, text) ->
            activity.view<EditText>(id).setText(text)
        }
        activity.view<Button>(R.id.start).performClick()
        await("the result") { store.state.bench?.result != null && store.state.bench?.running == false }
        val table = activity.view<TableLayout>(R.id.table)
        assertEquals(1 + 3, table.childCount)
        assertEquals(3, activity.view<SpeedChart>(R.id.chart).bars.size)
        assertTrue(activity.view<SpeedChart>(R.id.chart).contentDescription.contains("tg4"))
        assertEquals(3, store.state.bench!!.result!!.getJSONArray("skipped").length())
        activity.view<Button>(R.id.share).performClick()
        val shared = shadowOf(activity).nextStartedActivity.getParcelableExtra(Intent.EXTRA_INTENT, Intent::class.java)
        val json = JSONObject(assertNotNullText(shared?.getStringExtra(Intent.EXTRA_TEXT)))
        assertEquals("demo", json.getString("bundle"))
        assertEquals(3, json.getJSONArray("rows").getJSONObject(0).getJSONArray("samples_ns").length())
    }

    private fun assertNotNullText(text: String?): String {
        assertNotNull(text)
        return text.orEmpty()
    }

    @Test
    fun `numbers that are none are refused before anything is measured`() {
        val activity = Robolectric.buildActivity(BenchActivity::class.java, BenchActivity.intent(app, "demo")).setup().get()
        for (text in listOf("many", "0", "")) {
            activity.view<EditText>(R.id.prompts).setText(text)
            activity.view<EditText>(R.id.generates).setText(text)
            activity.view<Button>(R.id.start).performClick()
            assertEquals(View.VISIBLE, activity.view<View>(R.id.problem).visibility)
            assertNull(store.state.bench)
        }
    }

    @Test
    fun `removing a bundle removes its files`() {
        val activity = Robolectric.buildActivity(BundleActivity::class.java, BundleActivity.intent(app, "demo")).setup().get()
        activity.view<Button>(R.id.remove).performClick()
        (ShadowDialog.getLatestDialog() as AlertDialog).getButton(AlertDialog.BUTTON_POSITIVE).performClick()
        await("it is gone") { store.state.entries.isEmpty() && store.state.work == null }
        assertFalse(File(app.filesDir, "bundles/demo").exists())
    }

    @Test
    fun `an old processor is told and not crashed on`() {
        val folder = app.filesDir
        val old = File(folder, "old").apply { writeText("processor : 0\nFeatures : fp asimd crc32\n") }
        val new = File(folder, "new").apply { writeText("processor : 0\nFeatures : fp asimd atomics\n\nFeatures : fp atomics\n") }
        assertEquals(R.string.cpu_too_old, cpuProblem(old))
        assertNull(cpuProblem(new))
        assertNull("an x86 processor has no such line", cpuProblem(File(folder, "none")))
    }

    @Test
    fun `every control has words for a screen reader`() {
        for (layout in listOf(R.layout.bundles, R.layout.bundle, R.layout.chat, R.layout.bench, R.layout.settings)) {
            val root = android.view.LayoutInflater.from(android.view.ContextThemeWrapper(app, R.style.App)).inflate(layout, null)
            for (view in all(root)) {
                if (view is Button) assertTrue(view.text.isNotEmpty() || view.contentDescription != null)
                val labelled = all(root).any { it is TextView && it.labelFor == view.id }
                if (view is EditText) assertTrue("field ${view.id}", view.hint != null || labelled)
            }
        }
    }

    private fun all(view: View): List<View> {
        val inside = (view as? ViewGroup)?.let { group -> (0 until group.childCount).flatMap { all(group.getChildAt(it)) } }
        return listOf(view) + inside.orEmpty()
    }

    @Test
    fun `the licences of what is inside are shown`() {
        val activity = Robolectric.buildActivity(LicencesActivity::class.java).setup().get()
        val text = activity.view<TextView>(R.id.text).text.toString()
        for (told in listOf("ExecuTorch", "XNNPACK", "Apache License", "Mozilla Public License")) assertTrue(told, told in text)
    }
}
